"""What the routers do during training, summed on the device and read once per log line."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from router_tuning.model import RoutingLog

CAPACITY = "capacity"


def layer_key(key: int | tuple[int, str]) -> str:
    """Name of a router in logs: ``capacity_layer_07``, or ``capacity_layer_07_attn`` where a layer has several."""
    layer, part = key if isinstance(key, tuple) else (key, "")
    return f"{CAPACITY}_layer_{layer:02d}" + (f"_{part}" if part else "")


def summed(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sums of tensors over all processes, on the CPU, in one collective and one host sync."""
    packed = torch.cat([value.flatten().to(device) for value in values.values()])
    parts = reduce(packed, "sum").cpu().split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for part, (name, value) in zip(parts, values.items(), strict=True)}


class RoutingStatistics:
    """Sums over the micro-batches since the last reading; one collective and one host sync per reading.

    Task loss is the mean over the tokens that carry loss, capacity the mean over real sequences (or tokens), penalty
    the mean over micro-batches, all over all processes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget the sums."""
        self.sums: dict[str, Tensor] = {}
        self.started = time.perf_counter()

    @torch.no_grad()
    def add(self, log: RoutingLog, task_loss: Tensor, penalty: Tensor, inputs: dict[str, Any]) -> None:
        """Add one micro-batch.

        Args:
            task_loss: this micro-batch's share of the step's mean loss (all shares of a step sum to that mean).
            penalty: ``Σ_layers ReLU(capacity_l - target)`` of this micro-batch.
            inputs: the batch, for its real and padded tokens.
        """
        slots, mask = inputs["input_ids"].numel(), inputs.get("attention_mask")
        found: dict[str, Any] = {"task": task_loss, "penalty": penalty, "micro-batches": 1, "slots": slots}
        found["real"] = slots if mask is None else mask.sum()
        for key, share in log.capacity_tensors().items():
            name, weight = layer_key(key), sum(_weight(record) for record in log.records[key])
            found |= {f"executed {name}": share.float() * weight, f"counted {name}": weight}
        for name, value in found.items():
            value = torch.as_tensor(value, device=self.device, dtype=torch.float32)
            self.sums[name] = self.sums.get(name, 0) + value

    def read(self, steps: int) -> dict[str, float]:
        """Means over the ``steps`` optimizer steps since the last reading, and a reset. Collective."""
        seconds = time.perf_counter() - self.started
        found = {name: float(value) for name, value in summed(self.sums, self.device).items()}
        names = [name.removeprefix("counted ") for name in found if name.startswith("counted ")]
        counted = {name: found[f"counted {name}"] for name in names}
        capacity = {name: found[f"executed {name}"] / count if count else 1.0 for name, count in counted.items()}
        self.reset()
        return {
            "task_loss": found["task"] / max(steps, 1),
            "penalty": found["penalty"] / max(found["micro-batches"], 1),
            CAPACITY: sum(capacity.values()) / len(capacity),
            **capacity,
            "tokens_per_second": found["real"] / seconds,
            "padding": 1 - found["real"] / found["slots"],
            "memory_gb": peak_memory_gb(self.device),
        }


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in GB: of the GPU, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _weight(record) -> Tensor | int:
    return record.keep.numel() if record.real is None else record.real.sum()
