"""What can end a generation of a replica while the child process lives on."""


class PeerLostError(Exception):
    """Another stage of the replica is gone, or cannot be reached any more."""


class LeaveRequestedError(Exception):
    """The agent asked to leave the group while a step was under way."""


def out_of_memory(error: Exception) -> bool:
    """Python's, CUDA's, and the CPU allocator's, which has no type of its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
