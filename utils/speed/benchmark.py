"""Dense beside routed in one process: what skipping saves, as a share of what it could save at best.

Two bounds stand beside every ratio: the share of the decoder's operations that is left, and the *ideal*, measured in
the same rounds: at capacity c, ``(1 − c)`` of the time by which the dense model is slower than itself without the
routed modules: a copy of it that lacks them, or whose attention only projects keys and values (the part that
``kv_policy="keep"`` cannot skip).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from router_tuning.evaluation.timing import in_turns, spread, timed
from router_tuning.model import ModConfig, flops_share, kv_cache_bytes, route, routed_modules
from router_tuning.model.keys_values import project_kv
from router_tuning.speed.cells import Row, free_memory
from router_tuning.speed.steps import peak_bytes, profile_step


@dataclass(frozen=True)
class Setting:
    """What is timed: passes over ``[batch, length]`` (prefill), or single tokens behind ``length`` (decode).

    Args:
        routing: what is routed and how, with ``mod_layers``; its skip path is replaced by each of ``skips``.
        capacities: shares that run, by masks drawn at random.
        repeats: timed rounds (at least 2), in decoding one token each. builds: how often the models are built anew.
        skips: skip paths, each with every capacity. profiled: whether a dense and a routed pass are profiled as well.
    """

    phase: str
    batch: int
    length: int
    routing: ModConfig
    capacities: tuple[float, ...]
    repeats: int
    skips: tuple[str, ...] = ("zero",)
    builds: int = 1
    profiled: bool = False

    @property
    def exact_lengths(self) -> list[int]:
        """Lengths over which a row's capacity is exact: the prompt with one step to warm up, and the timed steps."""
        return [self.length] if self.phase == "prefill" else [self.length + 1, self.repeats]

    @property
    def copies(self) -> int:
        """Rows per prompt in decoding: four prompts at most are run, and their cache is repeated."""
        return 1 if self.phase == "prefill" else self.batch // next(n for n in (4, 3, 2, 1) if self.batch % n == 0)


def random_masks(setting: Setting, capacity: float) -> dict[tuple[int, str], Tensor]:
    """Masks of exactly the capacity (rounded to whole rows or tokens), one per routed module.

    Token level: bool ``[batch, tokens]``, exact over each of ``exact_lengths``. Sequence level: bool ``[batch]``;
    rows are dealt out over the layers so that the share over all of them is exact to one prompt.
    """
    generator = torch.Generator().manual_seed(0)
    masks, carried, prompts = {}, 0.0, setting.batch // setting.copies
    for target in setting.routing.targets:
        if setting.routing.parts[target[1]] == "sequence":
            carried += capacity * prompts
            count = int(carried + 1e-6)
            carried -= count
            kept = torch.randperm(prompts, generator=generator) < count
            masks[target] = kept.repeat_interleave(setting.copies)
        else:
            lengths = setting.exact_lengths
            masks[target] = torch.cat([_kept(setting.batch, n, capacity, generator) for n in lengths], dim=1)
    return masks


def _kept(rows: int, tokens: int, capacity: float, generator: torch.Generator) -> Tensor:
    order = torch.rand(rows, tokens, generator=generator).argsort(1)
    return torch.zeros(rows, tokens, dtype=torch.bool).scatter_(1, order[:, : round(capacity * tokens)], True)


@contextmanager
def imposed(model: PreTrainedModel, masks: Mapping[tuple[int, str], Tensor]) -> Iterator[None]:
    """Decide by masks ``[b]`` or ``[b, t]`` of the pass, at the cost of routers that decide for themselves.

    Every router computes its logits as always; a hook then puts those of the mask in their place.
    """
    modules, hooks = routed_modules(model), []
    for (layer, part), mask in masks.items():
        logits = torch.where(mask, 1.0, -1.0)[..., None]
        hooks.append(modules[f"{layer}.{part}"].mod_router.register_forward_hook(lambda *_, given=logits: given))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with its own modules and the same weights."""
    memo = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def reduced(dense: PreTrainedModel, routing: ModConfig) -> PreTrainedModel:
    """The dense model without the modules that ``routing`` names, or with what ``keep`` leaves of them."""
    model = shared_copy(dense)
    for index, part in routing.targets:
        layer, keys_only = model.model.layers[index], routing.kv_policy == "keep" and routing.parts[part] == "token"
        if part in ("mlp", "block"):
            layer.mlp.forward = lambda hidden_states: hidden_states.new_zeros(())
        if part in ("attn", "block"):

            def attend(hidden_states: Tensor, position_embeddings, past_key_values=None, own=layer.self_attn,
                       keys_only=keys_only, **_):  # fmt: skip
                states = project_kv(own, hidden_states, position_embeddings) if keys_only else None
                if keys_only and past_key_values is not None:
                    past_key_values.update(*states, own.layer_idx)
                return hidden_states.new_zeros(()), None

            layer.self_attn.forward = attend
    return model


class Variant:
    """One model under test, with the masks that it runs under, timed in turns with the others."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, setting: Setting, capacity: float | None = None) -> None:
        self.model, self.ids, self.setting = model, ids, setting
        masks = {} if capacity is None else random_masks(setting, capacity)
        self.masks = {target: mask.to(ids.device) for target, mask in masks.items()}
        self.decode, self.cache = setting.phase == "decode", None

    @property
    def capacity(self) -> float:
        """The share that runs in what is timed, mean over modules."""
        start = self.setting.length + 1 if self.decode else 0
        timed_parts = [mask[:, start:] if mask.dim() == 2 else mask for mask in self.masks.values()]
        return statistics.fmean(float(part.float().mean()) for part in timed_parts) if timed_parts else 1.0

    def imposed(self, columns: slice, rows: slice = slice(None)) -> AbstractContextManager[None]:
        """The masks of some tokens, cut out here: around what is timed, not within it."""
        cut = {key: m[rows, columns] if m.dim() == 2 else m[rows] for key, m in self.masks.items()}
        return imposed(self.model, cut) if cut else nullcontext()

    def at(self, number: int) -> slice:
        """The tokens of a step."""
        start = self.setting.length + number
        return slice(start, start + 1) if self.decode else slice(None)

    def forward(self, ids: Tensor) -> Any:
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def prepare(self) -> None:
        """Fill the cache that decoding starts from."""
        if self.decode:
            rows, prompt = slice(None, None, self.setting.copies), slice(self.setting.length)
            self.cache = DynamicCache(config=self.model.config)
            with self.imposed(prompt, rows):
                self.forward(self.ids[rows, prompt])
            self.cache.batch_repeat_interleave(self.setting.copies)

    def warm_up(self) -> Row:
        """The first step, untimed: its peak memory, and the keys and values held."""
        outputs: list[Any] = []
        self.prepare()
        with self.imposed(self.at(0)):
            peak = peak_bytes(lambda: outputs.append(self.step(0)), self.ids.device)
        return {"kv_bytes": kv_cache_bytes(outputs.pop().past_key_values), "peak_bytes": peak}

    def step(self, number: int) -> Any:
        """The pass over all tokens, or over one."""
        return self.forward(self.ids[:, self.at(number)])

    def time(self, number: int) -> float:
        """Seconds of a step in a round, behind the one that warmed up."""
        with self.imposed(self.at(number + 1)):
            return timed(lambda: self.step(number + 1), self.ids.device)


def variants(dense: PreTrainedModel, setting: Setting, ids: Tensor) -> dict[Any, Variant]:
    """``dense``, its ``ideal``, and the routed model by (skip path, capacity); weights are shared."""
    found: dict[Any, Variant] = {"dense": Variant(dense, ids, setting)}
    found["ideal"] = Variant(reduced(dense, setting.routing), ids, setting)
    for skip in setting.skips:
        model = routed_copy(dense, replace(setting.routing, skip=skip))
        found |= {(skip, capacity): Variant(model, ids, setting, capacity) for capacity in setting.capacities}
    return found


def routed_copy(dense: PreTrainedModel, routing: ModConfig) -> PreTrainedModel:
    """A routed model on the weights of ``dense``; a skip path gets random ones."""
    model = route(shared_copy(dense), **vars(routing))
    for name, tensor in model.state_dict().items():
        if "mod_skip" in name:
            tensor.normal_(std=0.02)
    return model


@torch.no_grad()
def benchmark(dense: PreTrainedModel, setting: Setting) -> list[Row]:
    """Time one setting at all its capacities, with each skip path.

    Every round runs each variant once, in an order that turns from round to round; medians over the rounds are
    reported with their quartiles, ratios are medians of per-round ratios. The variants are built ``builds`` times:
    where its objects happen to lie makes one of two equal models up to a percent faster than the other.

    Returns one dict per skip path and capacity; ``capacity`` is the share executed in what was timed, ``share`` what
    that leaves of the decoder's operations, ratios are routed / dense, and ``skip_efficiency`` is the share of the
    ideal saving that is reached (None where there is next to nothing to save).
    """
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, sum(setting.exact_lengths))
    ids = torch.randint(3, dense.config.vocab_size, shape, generator=generator).to(dense.device)
    measured: dict[Any, Row] = {}
    for _ in range(setting.builds):
        free_memory()
        found = variants(dense, setting, ids)
        for name, variant in found.items():
            measured[name] = {"times": [], **measured.get(name, {}), **variant.warm_up()}
        for name, times in in_turns({name: v.time for name, v in found.items()}, setting.repeats).items():
            measured[name]["times"] += times
    bounds = measured.pop("dense"), measured.pop("ideal")
    about = {name: getattr(setting, name) for name in ("phase", "batch", "length", "repeats", "builds")}
    about |= {name: getattr(setting.routing, name) for name in ("granularity", "kv_policy", "mod_layers")}
    rows = []
    for (skip, asked), one in measured.items():
        variant = found[skip, asked]
        share = flops_share(variant.model, variant.capacity, setting.length)
        row = {**about, "skip": skip, "decisions": asked, "share": share, "capacity": variant.capacity}
        rows.append(row | _compared(*bounds, one, variant.capacity))
    if setting.profiled:
        for name, variant in (("dense", found["dense"]), ("routed", found[next(iter(measured))])):
            with variant.imposed(variant.at(0)):
                rows[0][f"profile_{name}"] = profile_step(lambda v=variant: v.step(0), ids.device)
    return rows


def _compared(dense: Row, ideal: Row, routed: Row, capacity: float) -> Row:
    ratios, floors = (
        [mine / its for mine, its in zip(one["times"], dense["times"], strict=True)] for one in (routed, ideal)
    )
    ratio = statistics.median(ratios)
    possible = (1 - capacity) * (1 - statistics.median(floors))
    row = {
        "seconds_dense": spread(dense["times"]),
        "seconds_routed": spread(routed["times"]),
        "time_ratio": ratio,
        "time_ratio_spread": spread(ratios),
        "ideal_ratio": 1 - possible,
        "skip_efficiency": (1 - ratio) / possible if possible > 0.005 else None,
    }
    for name in ("kv_bytes", "peak_bytes"):
        row |= {f"{name}_dense": dense[name], f"{name}_routed": routed[name]}
    return row
