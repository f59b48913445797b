"""How much an object holds."""

import pickle


def room(of: object) -> int:
    """The bytes of all that an object holds, pickled.

    It counts only what the object keeps, and is the same in every run. What the process has
    allocated is not: caches of libraries and other threads change it.
    """
    return len(pickle.dumps(of))
