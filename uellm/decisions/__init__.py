"""What was decided, of what: recorded, replayed, and explained.

Pure but for protobuf, like ``uellm.convert``: ``now`` is an argument, and nothing waits.
"""
