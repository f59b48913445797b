"""What can end a generation of a replica while the child process lives on."""


class PeerLostError(Exception):
    """Another stage of the replica is gone, or cannot be reached any more."""


class LeaveRequestedError(Exception):
    """The agent asked to leave the group while a step was under way."""
