"""The scheduler: orders each model's requests, promises, and sends them to replicas late."""
