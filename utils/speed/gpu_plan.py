"""The speed table at real size: what is timed on a GPU, in the order of its worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from router_tuning.model import ModConfig
from router_tuning.model.configuration_mod import select_layers
from router_tuning.speed.benchmark import Setting, benchmark, routed_copy, variants
from router_tuning.speed.cells import Cell, Row, free_memory
from router_tuning.speed.compiled import compiled_decode
from router_tuning.speed.limits import Accelerator
from router_tuning.speed.profiling import profile_step
from router_tuning.speed.tuning_step import measure_steps

# The published one first, then what has most to save.
ORDER = ("attn_sequence", "attn_token", "mlp_token", "block_sequence", "attn_token+mlp_token", "block_token")
ORDER += ("mlp_sequence",)
SKIPS = ("zero", "low_rank")


@dataclass(frozen=True)
class Sizes:
    """Workloads as (phase, batch, length, rounds), the most telling first; the tuning step as (batch, length)."""

    workloads: tuple[tuple[str, int, int, int], ...]
    tuning: tuple[int, int]
    generated: int


FULL = Sizes(
    (("prefill", 4, 2048, 7), ("decode", 1, 2048, 32), ("decode", 32, 2048, 32), ("prefill", 1, 8192, 5)),
    tuning=(8, 2048),
    generated=64,
)
TINY = Sizes(
    (("prefill", 2, 8, 2), ("decode", 1, 8, 2), ("decode", 8, 8, 2), ("prefill", 1, 16, 2)), tuning=(2, 8), generated=6
)


def gpu_cells(
    dense: PreTrainedModel, accelerator: Accelerator, sizes: Sizes, measured: Callable[[], list[Row]]
) -> list[Cell]:
    """All cells; half of the layers are routed, the deepest but the last.

    Args:
        accelerator: the ceilings of the device. measured: gives the rows so far, of which the profiles choose.
    """
    depth = dense.config.num_hidden_layers
    layers = select_layers(depth, depth // 2, None)

    def timed_cells(phase: str, batch: int, length: int, rounds: int) -> list[Cell]:
        kind = f"{phase} {batch}x{length}"
        routings = [ModConfig(mod_layers=layers, granularity=granularity) for granularity in ORDER]
        settings = [Setting(phase, batch, length, routing, (1.0, 0.5), rounds, SKIPS) for routing in routings]
        return [
            Cell(f"{kind} {one.routing.granularity}", kind, lambda one=one: timed_rows(dense, one, accelerator))
            for one in settings
        ]

    prefill, decode, batched, long = (timed_cells(*workload) for workload in sizes.workloads)
    tuning = Cell("tuning step", "tuning", lambda: [tuning_row(dense, layers, *sizes.tuning)])
    profiles = [
        Cell(f"profile {phase}", "profile", lambda phase=phase: profile_rows(dense, worst(measured(), phase)))
        for phase in ("prefill", "decode")
    ]
    compiled = [
        Cell(
            f"compiled decode {batch}x{length}",
            "compiled",
            lambda b=batch, t=length: [compiled_decode(dense, b, t, sizes.generated, sizes.generated // 2)],
            expected=90,
        )
        for phase, batch, length, _ in sizes.workloads
        if phase == "decode"
    ]
    return [*prefill, *decode, tuning, *batched, *profiles, *long, *compiled]


def timed_rows(dense: PreTrainedModel, setting: Setting, accelerator: Accelerator) -> list[Row]:
    """The setting with all its skip paths in turns or, where the memory does not hold so many caches, one by one."""
    try:
        return benchmark(dense, setting, accelerator)
    except torch.OutOfMemoryError:
        if len(setting.skips) == 1:
            raise
    free_memory()
    return [row for skip in setting.skips for row in benchmark(dense, replace(setting, skips=(skip,)), accelerator)]


def tuning_row(dense: PreTrainedModel, layers: list[int], batch: int, length: int) -> Row:
    """One tuning step of routers alone on ``[batch, length]``, in as many micro-batches as the memory asks for."""
    routing = ModConfig(mod_layers=layers, granularity=ORDER[0])
    ids = torch.randint(3, dense.config.vocab_size, (batch, length), device=dense.device)
    rows = batch
    while True:
        micro = {"input_ids": ids[:rows], "attention_mask": torch.ones_like(ids[:rows]), "labels": ids[:rows]}
        try:
            found = measure_steps(lambda: routed_copy(dense, routing), micro, rounds=3, modes=("routers",))["routers"]
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        free_memory()
        rows //= 2
    step = {"batch": batch, "length": length, "granularity": ORDER[0], "micro_batch": rows}
    return step | found | {"seconds_step": found["seconds"] * batch / rows}


def worst(rows: list[Row], phase: str) -> Row:
    """The row of a phase whose time lies furthest above its limit, both as shares of the dense time.

    Raises:
        ValueError: if nothing of that phase was measured.
    """
    candidates = [row for row in rows if "time_ratio" in row and row["phase"] == phase and row["decisions"] != 1.0]
    if not candidates:
        raise ValueError(f"nothing to profile: no cell of {phase} was measured")
    return max(candidates, key=lambda row: row["time_ratio"] - row["limit_ratio"])


@torch.no_grad()
def profile_rows(dense: PreTrainedModel, row: Row) -> list[Row]:
    """A profiled step of the dense model, of its ideal and of the routed one, in the setting of ``row``."""
    routing = ModConfig(**{name: row[name] for name in ("mod_layers", "granularity", "kv_policy")})
    setting = Setting(row["phase"], row["batch"], row["length"], routing, (row["decisions"],), 2, (row["skip"],))
    ids = torch.randint(3, dense.config.vocab_size, (setting.batch, sum(setting.exact_lengths)), device=dense.device)
    rows = []
    for name, variant in variants(dense, setting, ids).items():
        variant.prepare()
        variant.time(0)
        found = {"seconds_step": variant.time(1)}
        with variant.imposed(variant.at(2)):
            found |= profile_step(lambda v=variant: v.step(2), ids.device)
        about = {key: row[key] for key in ("phase", "batch", "length", "granularity", "skip", "decisions")}
        rows.append({"profiled": name if isinstance(name, str) else "routed", **about, **found})
    return rows
