"""Seconds of runs that take turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from tqdm import tqdm


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run, the device idle before it and done after it; on a GPU by its own events."""
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


def in_turns(runs: Mapping[Hashable, Callable[[int], float]], rounds: int, told: str = "") -> dict[Any, list[float]]:
    """What each run returns in every round, in an order that turns from round to round.

    Args:
        runs: by name; called with the number of the round, from 0, they return seconds. told: beside the time left.
    """
    names, found = list(runs), {name: [] for name in runs}
    for number in tqdm(range(rounds), desc=told, leave=False):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(runs[name](number))
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of at least two values."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}
