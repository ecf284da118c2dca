"""Seconds, memory and ceilings of a device: events and the allocator on a GPU, clock and resident set on a CPU."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from router_tuning.speed.limits import Accelerator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LIMIT = 1 << 30


def now(device: torch.device) -> Any:
    """The moment at which the device gets here: an event in its stream, or the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from one moment to another, once the device has reached both."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, the device idle before it and done after it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now(device)
    run()
    return seconds_between(start, now(device))


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


@torch.no_grad()
def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> Accelerator:
    """What this device reaches: a large copy (bytes read and written), and a square matrix product.

    Both on random numbers, which a GPU multiplies more slowly than zeros.
    """
    side, values = (8192, 1 << 30) if device.type == "cuda" else (512, 1 << 24)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randn(1 << 20, device=device, dtype=dtype).repeat(values >> 20)
    target = torch.empty_like(source)
    seconds = {}
    for name, run in (("product", lambda: torch.mm(left, right, out=product)), ("copy", lambda: target.copy_(source))):
        timed(run, device)
        seconds[name] = statistics.median(timed(run, device) for _ in range(repeats))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Accelerator(f"{name}, measured", 2 * side**3 / seconds["product"], 2 * source.nbytes / seconds["copy"])


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
