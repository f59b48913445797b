"""A child process of a worker: one stage of one replica, and the loop that runs it.

Nothing here imports grpc or redis; torch and transformers are imported by the modules of the
"shard" engine only, so that the "instant" engine starts without them.
"""
