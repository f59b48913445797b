"""The gateway: the public API in front of the queues."""
