"""Dense beside routed in one process: what skipping saves, as a share of what it could save at best.

The ideal is the dense model's own time for exactly the work that is skipped: at capacity c ``(1 − c)`` of the
difference between it and the reduced model of :mod:`.speed_ideal`. Skip efficiency is the saving that was reached over
that ideal.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from router_tuning.data.pages import return_freed_pages
from router_tuning.evaluation.cost import count_flops
from router_tuning.model import ModConfig, force_routing, kv_cache_bytes, record_routing, route
from router_tuning.model.configuration_mod import Layers
from router_tuning.speed.ideal import reduced, shared_copy


@dataclass
class Setting:
    """One benchmark cell: inputs ``[batch, length]`` (prefill), or single tokens after ``length`` (decode)."""

    phase: str
    batch: int
    length: int
    granularity: str
    kv_policy: str
    mod_layers: Layers
    capacities: list[float | None]
    repeats: int
    builds: int = 1
    seed: int = 0

    @property
    def routing(self) -> ModConfig:
        """What is routed."""
        return ModConfig(mod_layers=self.mod_layers, granularity=self.granularity, kv_policy=self.kv_policy)

    @property
    def stretches(self) -> list[int]:
        """Lengths of what a row's capacity is exact for: the prompt, and (decode) the steps that are timed."""
        return [self.length] if self.phase == "prefill" else [self.length + 1, self.repeats]


def forced_mask(setting: Setting, capacity: float) -> dict[Any, Tensor]:
    """Random masks of exactly the capacity (rounded to whole rows or tokens), one per routed module.

    Token level: ``[batch, tokens]``, exact for the prompt and for the steps behind it.

    Sequence level: rows are dealt out over the layers so that the share over all of them is exact to one row.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    masks = {}
    carried = 0.0
    for layer, part in setting.routing.targets:
        if setting.routing.parts[part] == "sequence":
            carried += capacity * setting.batch
            count = int(carried + 1e-6)
            carried -= count
            mask = torch.zeros(setting.batch, dtype=torch.bool)
            mask[torch.randperm(setting.batch, generator=generator)[:count]] = True
        else:
            mask = torch.cat([_kept(setting.batch, n, capacity, generator) for n in setting.stretches], dim=1)
        masks[layer, part] = mask
    return masks


def _kept(rows: int, tokens: int, capacity: float, generator: torch.Generator) -> Tensor:
    order = torch.rand(rows, tokens, generator=generator).argsort(1)
    return torch.zeros(rows, tokens, dtype=torch.bool).scatter_(1, order[:, : round(capacity * tokens)], True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
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
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before
    except OSError:
        return None


def _resident(field: str) -> int:
    with open(f"/proc/{os.getpid()}/status") as handle:
        return next(int(line.split()[1]) * 1024 for line in handle if line.startswith(f"{field}:"))


class _Variant:
    """One model under test with its forced masks, timed in turns with the others."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, setting: Setting, masks=None) -> None:
        self.model, self.ids, self.setting, self.masks = model, ids, setting, masks
        self.cache: Any = None

    def forced(self, number: int | None = None) -> AbstractContextManager[None]:
        """Impose the masks, all or those of one step, cut out here: around what is timed, not within it."""
        if self.masks is None:
            return nullcontext()
        masks = self.masks
        if number is not None and self.setting.phase == "decode":
            masks = {key: mask if mask.dim() == 1 else self._at(mask, number) for key, mask in masks.items()}
        return force_routing(self.model, masks)

    def forward(self, ids: Tensor, use_cache: bool = True):
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=use_cache, logits_to_keep=1)

    def prepare(self) -> None:
        """Fill the cache that decoding starts from."""
        self.cache = None
        if self.setting.phase == "decode":
            self.cache = DynamicCache(config=self.model.config)
            self.forward(self.ids[:, : self.setting.length])

    def step(self, number: int) -> None:
        if self.setting.phase == "prefill":
            self.forward(self.ids)
        else:
            self.forward(self._at(self.ids, number))

    def _at(self, tokens: Tensor, number: int) -> Tensor:
        """The column of a decoding step in ``[b, tokens]``."""
        return tokens.narrow(1, self.setting.length + number, 1)

    def measure(self) -> dict[str, Any]:
        """FLOPs, bytes of keys and values, peak memory, share executed in the timed steps; room for their times."""
        with self.forced():
            self.prepare()
            peak = _peak_bytes(lambda: self.step(0), self.ids.device)
            self.prepare()
            out = self.forward(self.ids) if self.cache is None else None
            held = kv_cache_bytes(out.past_key_values if out is not None else self.cache)
            if self.setting.phase == "prefill":
                flops = count_flops(self.model, {"input_ids": self.ids})
            else:
                inputs = {"input_ids": self._at(self.ids, 0), "past_key_values": self.cache}
                flops = count_flops(self.model, inputs, use_cache=True)
            capacity = 1.0 if self.masks is None else self._capacity()
        return {"flops": flops, "kv_bytes": held, "peak_bytes": peak, "capacity": capacity, "times": []}

    def _capacity(self) -> float:
        """Mean over the routers: of the timed tokens, or of the decision that holds from the prompt on."""
        with record_routing(self.model) as log:
            self.prepare()
            if self.setting.phase == "prefill":
                self.forward(self.ids)
        shares = log.capacity()
        if self.setting.phase == "decode":
            self.step(0)
            with record_routing(self.model) as log:
                self.forward(self.ids[:, self.setting.length + 1 :])
            shares |= log.capacity()
        del shares["total"]
        return sum(shares.values()) / len(shares)


def _variants(dense: PreTrainedModel, setting: Setting, routed: PreTrainedModel | None, ids: Tensor) -> list[_Variant]:
    """Dense, its ideal, and the routed model at each capacity."""
    if routed is None:
        routed = route(
            shared_copy(dense),
            mod_layers=setting.mod_layers,
            granularity=setting.granularity,
            kv_policy=setting.kv_policy,
        )
    floor = reduced(dense, setting.routing)
    variants = [_Variant(dense, ids, setting), _Variant(floor, ids, setting)]
    for capacity in setting.capacities:
        masks = {} if capacity is None else forced_mask(setting, capacity)
        variants.append(_Variant(routed, ids, setting, {key: mask.to(ids.device) for key, mask in masks.items()}))
    return variants


@torch.no_grad()
def benchmark(dense: PreTrainedModel, setting: Setting, routed: PreTrainedModel | None = None) -> list[dict[str, Any]]:
    """Time one setting at all its capacities; a capacity of None lets the routers of ``routed`` decide.

    Every round runs each variant once, in an order that turns from round to round; medians over the rounds are
    reported with their quartiles, ratios are medians of per-round ratios. The variants are built ``builds`` times:
    where its objects happen to lie makes one of two equal models up to a percent faster than the other.

    Returns one dict per capacity: seconds, ``time_ratio`` (routed / dense), ``ideal_ratio``, ``skip_efficiency``
    (None where nothing is skipped), FLOPs, bytes of keys and values, peak bytes; ``capacity`` is the share executed
    in what was timed.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (setting.batch, sum(setting.stretches))
    ids = torch.randint(3, dense.config.vocab_size, shape, generator=generator).to(dense.device)
    measured: list[dict[str, Any]] = []
    for _ in range(setting.builds):
        gc.collect()  # what was built before, whose parts hold references to each other
        variants = _variants(dense, setting, routed, ids)
        measured = measured or [variant.measure() for variant in variants]
        for variant in variants:
            with variant.forced():
                variant.prepare()
        for number in range(setting.repeats + 1):
            turn = number % len(variants)
            for place in [*range(turn, len(variants)), *range(turn)]:
                with variants[place].forced(number):
                    seconds = _timed(lambda v=variants[place], n=number: v.step(n), ids.device)
                if number:
                    measured[place]["times"].append(seconds)
    dense_one, floor, *rest = measured
    return [_row(setting, asked, dense_one, floor, one) for asked, one in zip(setting.capacities, rest, strict=True)]


def _row(
    setting: Setting, asked: float | None, dense: dict[str, Any], floor: dict[str, Any], routed: dict[str, Any]
) -> dict[str, Any]:
    capacity = routed["capacity"]
    ratio = statistics.median(r / d for r, d in zip(routed["times"], dense["times"], strict=True))
    floor_ratio = statistics.median(f / d for f, d in zip(floor["times"], dense["times"], strict=True))
    ideal = (1 - capacity) * (1 - floor_ratio)
    return {
        "phase": setting.phase,
        "batch": setting.batch,
        "length": setting.length,
        "granularity": setting.granularity,
        "kv_policy": setting.kv_policy,
        "routed_layers": setting.mod_layers,
        "decisions": "own" if asked is None else str(asked),
        "capacity": capacity,
        "seconds_dense": _spread(dense["times"]),
        "seconds_routed": _spread(routed["times"]),
        "time_ratio": ratio,
        "speed_up": 1 / ratio,
        "ideal_ratio": 1 - ideal,
        "skip_efficiency": (1 - ratio) / ideal if ideal > 0.005 else None,
        "slower_than_dense": ratio > 1,
        **{f"{name}_dense": dense[name] for name in ("flops", "kv_bytes", "peak_bytes")},
        **{f"{name}_routed": routed[name] for name in ("flops", "kv_bytes", "peak_bytes")},
        "repeats": setting.repeats,
        "builds": setting.builds,
    }


def _spread(times: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(times, n=4)
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}
