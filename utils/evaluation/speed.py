"""Dense beside routed in one process: what skipping saves, as a share of what it could save at best.

The ideal is the dense model's own time for exactly the work that is skipped. It is measured in place, on a copy of
the dense model that lacks the routed modules (``without``), or whose attention only projects keys and values
(``keys_only``, the part that ``kv_policy="keep"`` cannot skip). At capacity c the ideal saving is ``(1 − c)`` of the
difference; skip efficiency is the saving that was reached over that ideal.
"""

from __future__ import annotations

import copy
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from utils.evaluation.cost import count_flops
from utils.model import ModConfig, force_routing, kv_cache_bytes, record_routing, route
from utils.model.keys_values import project_kv


@dataclass
class Setting:
    """One benchmark cell: inputs ``[batch, length]`` (prefill), or single tokens after ``length`` (decode)."""

    phase: str
    batch: int
    length: int
    granularity: str
    kv_policy: str
    mod_layers: list[int]
    capacities: list[float | None]
    repeats: int
    seed: int = 0


class _NoUpdate(nn.Module):
    """A module that was cut out: no update, no work."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, *args, hidden_states: Tensor | None = None, **kwargs):
        zero = (args[0] if hidden_states is None else hidden_states).new_zeros(())
        return (zero, None) if self.pair else zero


class _KeysOnly(nn.Module):
    """Attention that fills the cache and does nothing else."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, position_embeddings, past_key_values=None, **kwargs):
        states = project_kv(self.attention, hidden_states, position_embeddings)
        if past_key_values is not None:
            past_key_values.update(*states, self.attention.layer_idx)
        return hidden_states.new_zeros(()), None


class _IdleLayer(nn.Module):
    """A decoder layer that was cut out, or reduced to filling the cache."""

    def __init__(self, layer: nn.Module, keys_only: bool) -> None:
        super().__init__()
        self.norm = layer.input_layernorm
        self.keys = _KeysOnly(layer.self_attn) if keys_only else None

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        if self.keys is not None:
            self.keys(self.norm(hidden_states), **kwargs)
        return hidden_states


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with its own modules and the same weights."""
    memo = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def reduced(dense: PreTrainedModel, parts: Mapping[str, str], layers: list[int], keys_only: bool) -> PreTrainedModel:
    """The dense model without the routed modules, or with what ``keep`` leaves of them."""
    model = shared_copy(dense)
    for index in layers:
        layer = model.model.layers[index]
        if "block" in parts:
            model.model.layers[index] = _IdleLayer(layer, keys_only)
        if "attn" in parts:
            layer.self_attn = _KeysOnly(layer.self_attn) if keys_only else _NoUpdate(pair=True)
        if "mlp" in parts:
            layer.mlp = _NoUpdate(pair=False)
    return model


def forced_mask(setting: Setting, level: str, capacity: float, tokens: int) -> dict[Any, Tensor]:
    """Random masks of exactly the capacity (rounded to whole rows or tokens), one per routed module.

    Sequence level: rows are dealt out over the layers so that the share over all of them is exact to one row.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    masks = {}
    parts = ModConfig(mod_layers=[0], granularity=setting.granularity).parts
    carried = 0.0
    for layer in setting.mod_layers:
        for part in parts:
            if parts[part] == "sequence":
                carried += capacity * setting.batch
                count = int(carried + 1e-6)
                carried -= count
                mask = torch.zeros(setting.batch, dtype=torch.bool)
                mask[torch.randperm(setting.batch, generator=generator)[:count]] = True
            else:
                order = torch.rand(setting.batch, tokens, generator=generator).argsort(1)
                mask = torch.zeros(setting.batch, tokens, dtype=torch.bool)
                mask.scatter_(1, order[:, : round(capacity * tokens)], True)
            masks[layer, part] = mask
    return masks


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

    def __init__(self, name: str, model: PreTrainedModel, ids: Tensor, setting: Setting, masks=None) -> None:
        self.name, self.model, self.ids, self.setting, self.masks = name, model, ids, setting, masks
        self.times: list[float] = []
        self.cache: Any = None
        self.kv_bytes = 0

    def forced(self) -> AbstractContextManager[None]:
        """Impose the masks: around what is timed, not within it."""
        return nullcontext() if self.masks is None else force_routing(self.model, self.masks)

    def forward(self, ids: Tensor, cache: Any = None, use_cache: bool = True):
        return self.model(input_ids=ids, past_key_values=cache, use_cache=use_cache, logits_to_keep=1)

    def prepare(self) -> None:
        """Fill the cache that decoding starts from."""
        self.cache = None
        if self.setting.phase == "decode":
            self.cache = DynamicCache(config=self.model.config)
            self.forward(self.ids[:, : self.setting.length], self.cache)

    def step(self, number: int) -> None:
        if self.setting.phase == "prefill":
            self.forward(self.ids)
        else:
            position = self.setting.length + number
            self.forward(self.ids[:, position : position + 1], self.cache)

    def measure_static(self) -> dict[str, Any]:
        """FLOPs, bytes of keys and values, and peak memory of the timed step."""
        self.prepare()
        peak = _peak_bytes(lambda: self.step(0), self.ids.device)
        self.prepare()
        out = self.forward(self.ids[:, : self.setting.length]) if self.cache is None else None
        held = kv_cache_bytes(out.past_key_values if out is not None else self.cache)
        if self.setting.phase == "prefill":
            flops = self._flops({"input_ids": self.ids})
        else:
            position = self.setting.length
            flops = self._flops({"input_ids": self.ids[:, position : position + 1], "past_key_values": self.cache})
        return {"flops": flops, "kv_bytes": held, "peak_bytes": peak}

    def _flops(self, inputs: dict[str, Any]) -> int:
        return count_flops(self.model, inputs, use_cache="past_key_values" in inputs)


@torch.no_grad()
def benchmark(dense: PreTrainedModel, setting: Setting, routed: PreTrainedModel | None = None) -> list[dict[str, Any]]:
    """Time one setting at all its capacities; a capacity of None lets the routers of ``routed`` decide.

    Every round runs each variant once, in an order that turns from round to round; medians over the rounds are
    reported with their quartiles, ratios are medians of per-round ratios.

    Returns one dict per capacity: seconds, ``time_ratio`` (routed / dense), ``ideal_ratio``, ``skip_efficiency``
    (None where nothing is skipped), FLOPs, bytes of keys and values, peak bytes.
    """
    gc.collect()  # the models of the cell before, which hold references to each other
    parts = ModConfig(mod_layers=[0], granularity=setting.granularity).parts
    if routed is None:
        routed = route(
            shared_copy(dense),
            mod_layers=setting.mod_layers,
            granularity=setting.granularity,
            kv_policy=setting.kv_policy,
        )
    tokens = setting.length if setting.phase == "prefill" else setting.length + setting.repeats + 2
    generator = torch.Generator().manual_seed(setting.seed)
    ids = torch.randint(3, dense.config.vocab_size, (setting.batch, tokens), generator=generator).to(dense.device)
    keys_only = setting.kv_policy == "keep" and (parts.get("attn") or parts.get("block")) == "token"
    floor = reduced(dense, parts, setting.mod_layers, keys_only)
    variants = [_Variant("dense", dense, ids, setting), _Variant("floor", floor, ids, setting)]
    for capacity in setting.capacities:
        masks = {} if capacity is None else forced_mask(setting, setting.granularity, capacity, tokens)
        masks = {key: mask.to(dense.device) for key, mask in masks.items()}
        variants.append(_Variant(f"routed@{capacity}", routed, ids, setting, masks))
    for variant in variants:
        with variant.forced():
            variant.static = measure(variant)
    for number in range(setting.repeats + 1):
        turn = number % len(variants)
        for variant in variants[turn:] + variants[:turn]:
            with variant.forced():
                seconds = _timed(lambda v=variant, n=number: v.step(n), ids.device)
            if number:
                variant.times.append(seconds)
    dense_variant, floor_variant, *rest = variants
    return [_row(setting, dense_variant, floor_variant, variant) for variant in rest]


def measure(variant: _Variant) -> dict[str, Any]:
    """Static costs and the reached capacity of one variant; leaves it ready for its first timed step."""
    static = variant.measure_static()
    static["capacity"] = 1.0
    if variant.masks is not None:
        with record_routing(variant.model) as log:
            variant.prepare()
            if variant.setting.phase == "prefill":
                variant.forward(variant.ids)
        static["capacity"] = log.capacity()["total"]
    variant.prepare()
    return static


def _row(setting: Setting, dense: _Variant, floor: _Variant, routed: _Variant) -> dict[str, Any]:
    capacity = routed.static["capacity"]
    ratio = statistics.median(r / d for r, d in zip(routed.times, dense.times, strict=True))
    floor_ratio = statistics.median(f / d for f, d in zip(floor.times, dense.times, strict=True))
    ideal = (1 - capacity) * (1 - floor_ratio)
    return {
        "phase": setting.phase,
        "batch": setting.batch,
        "length": setting.length,
        "granularity": setting.granularity,
        "kv_policy": setting.kv_policy,
        "routed_layers": setting.mod_layers,
        "decisions": routed.name.removeprefix("routed@"),
        "capacity": capacity,
        "seconds_dense": _spread(dense.times),
        "seconds_routed": _spread(routed.times),
        "time_ratio": ratio,
        "speed_up": 1 / ratio,
        "ideal_ratio": 1 - ideal,
        "skip_efficiency": (1 - ratio) / ideal if ideal > 0.005 else None,
        "slower_than_dense": ratio > 1,
        **{f"{name}_dense": dense.static[name] for name in ("flops", "kv_bytes", "peak_bytes")},
        **{f"{name}_routed": routed.static[name] for name in ("flops", "kv_bytes", "peak_bytes")},
        "repeats": setting.repeats,
    }


def _spread(times: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(times, n=4)
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}
