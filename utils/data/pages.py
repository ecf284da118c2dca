"""Memory pages that have been freed: kept by the process, or given back to the system and mapped anew."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LIMIT = 1 << 30


def keep_freed_pages() -> bool:
    """Have this process keep what it frees, as other allocators do by themselves; False if it cannot be told so.

    By default the C library of Linux gives large blocks back at once or not, as the heap happens to lie: a forward
    pass then faults some ten thousand pages in, or none, whatever it computes. That is up to a quarter of its time,
    and more than the difference between a dense model and a routed one.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system, or another C library
        return False
    return all(set_option(option, _LIMIT) for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))
