"""The mesh's state in Redis: streams as queues, records, leases, the registry.

``keys`` names everything, ``lua/`` holds the atomic scripts, ``queue`` is their typed face for one
model, ``registry`` finds services and deployments, ``connection`` and ``clock`` reach Redis.
docs/queues.md states the protocol and its invariants.
"""
