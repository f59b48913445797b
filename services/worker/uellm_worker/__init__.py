"""A worker: an agent that owns devices, and the child processes that compute on them."""
