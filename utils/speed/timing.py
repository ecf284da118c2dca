"""Seconds and memory of one run: events and the allocator on a GPU, clock and resident set on a CPU."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LIMIT = 1 << 30


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, the device idle before it and done after it."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of at least two values."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of one run over what was held before it (CUDA allocator; resident set on Linux; else None)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    return_freed_pages()
    try:
        with open("/proc/self/clear_refs", "w") as handle:
            handle.write("5")
    except OSError:
        run()
        return None
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    with open(f"/proc/{os.getpid()}/status") as handle:
        return next(int(line.split()[1]) * 1024 for line in handle if line.startswith(f"{field}:"))


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
