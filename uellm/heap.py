"""The C library's free memory."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of parameters in glibc's malloc.h."""
KEPT_BYTES = 64 << 20
LARGEST_BYTES = 32 << 20
"""The most that glibc takes."""


def keep_freed_memory() -> None:
    """Have arrays that are freed leave their pages to the next ones, 64 MiB of them at most.

    By itself glibc gives them back, and the system clears new ones: of a decision on a queue of
    100,000 that was a fifth of the time. Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(_TRIM_THRESHOLD, KEPT_BYTES)
        tune(_MMAP_THRESHOLD, LARGEST_BYTES)
