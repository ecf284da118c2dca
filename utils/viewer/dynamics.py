"""Is a routing dynamic? Entropy of its decisions over inputs, and what they tell about the task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def entropy(counts: Sequence[float]) -> float:
    """Shannon entropy in bits of unnormalised counts."""
    total = sum(counts)
    return -sum(c / total * math.log2(c / total) for c in counts if c > 0) if total else 0.0


def dynamics(decisions: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
    """How decisions vary over inputs and tasks.

    Args:
        decisions: ``{task: rows of 0/1 per router}`` of a model that decides per sequence.

    Returns ``routers`` (per router: share kept, ``entropy`` of the decision over inputs in bits,
    ``information`` about the task in bits), ``mask_entropy`` and ``task_information`` of the whole mask,
    ``masks`` (how many different ones occur), ``most_common`` (share of the most frequent) and ``kept_by_task``
    (``{task: share kept per router}``).

    Raises ValueError if there are no decisions.
    """
    rows = {task: [tuple(row) for row in found] for task, found in decisions.items() if found}
    everything = [row for found in rows.values() for row in found]
    if not everything:
        raise ValueError("no decisions to report on: run a sequence-level routed model")
    routers = []
    for r in range(len(everything[0])):
        by_task = {task: [row[r] for row in found] for task, found in rows.items()}
        routers.append(
            {
                "kept": sum(row[r] for row in everything) / len(everything),
                "entropy": entropy(list(Counter(row[r] for row in everything).values())),
                "information": _information(by_task),
            }
        )
    masks = Counter(everything)
    return {
        "inputs": len(everything),
        "routers": routers,
        "mask_entropy": entropy(list(masks.values())),
        "task_information": _information(rows),
        "masks": len(masks),
        "most_common": max(masks.values()) / len(everything),
        "kept_by_task": {
            task: [sum(row[r] for row in found) / len(found) for r in range(len(found[0]))]
            for task, found in rows.items()
        },
    }


def _information(by_task: Mapping[str, Sequence[Any]]) -> float:
    """Mutual information in bits between the task and the value: ``H(value) - H(value | task)``, plug-in estimate."""
    everything = [value for found in by_task.values() for value in found]
    within = sum(len(found) / len(everything) * entropy(list(Counter(found).values())) for found in by_task.values())
    return max(0.0, entropy(list(Counter(everything).values())) - within)
