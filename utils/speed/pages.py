"""Memory pages that have been freed: kept by the process, or given back to the system and mapped anew."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LIMIT = 1 << 30


def keep_freed_pages() -> bool:
    """Have this process keep what it frees, as other allocators do by themselves; False if it cannot be told so.

    By default the C library of Linux gives large blocks back at once or not, as the heap happens to lie: a forward
    pass then faults some ten thousand pages in, or none, whatever it computes. That is up to a quarter of its time,
    and more than the difference between a dense model and a routed one.
    """
    set_option = _c_function("mallopt")
    return set_option is not None and all(set_option(o, _LIMIT) for o in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))


def return_freed_pages() -> None:
    """Give back once what is free now, so that the resident set tells what is in use; nothing where it can't be."""
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


def _c_function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None on another system, or with another library."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
