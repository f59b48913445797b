"""The C library's free memory."""

import ctypes


def trim_heap() -> None:
    """Give what the C library keeps for later back to the system, where it can.

    Reading weights leaves holes of their size behind: what they were converted from.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
