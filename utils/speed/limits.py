"""What skipping can save at best on an accelerator, from floating-point operations and bytes alone.

A roofline: every part of a layer takes ``max(operations / peak, bytes / bandwidth)``, parts follow one another,
nothing else costs anything. Bytes are weights (read once per pass if any row runs the part) and keys and values
(written once, and read by every query's pass over the cache); activations are left out, so that these are upper
bounds of the speed-up. Measured speed-ups beyond them would have another cause than the skipped work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from router_tuning.evaluation.tables import Table
from router_tuning.model import GRANULARITIES as EVERY
from router_tuning.model import ModConfig

GRANULARITIES = (*(name for name in EVERY if "expert" not in name), "attn_token+mlp_token")


@dataclass(frozen=True)
class Accelerator:
    """Peak dense operations per second (bfloat16 in data sheets), and memory bytes per second."""

    name: str
    operations: float
    bandwidth: float


ACCELERATORS = {
    # NVIDIA's data sheets, SXM boards, without sparsity.
    "h100": Accelerator("H100 SXM", 989e12, 3.35e12),
    "h200": Accelerator("H200 SXM", 989e12, 4.8e12),
}


@dataclass(frozen=True)
class Workload:
    """``batch`` rows of ``tokens`` new tokens behind ``past`` cached ones, under uniformly random decisions.

    ``value_bytes`` is the size of a weight, key or value: 2 in bfloat16.
    """

    batch: int
    tokens: int
    past: int
    value_bytes: int = 2

    def pairs(self, causal: bool) -> float:
        """Query-key pairs of one row; a kernel without the saving of causality computes them all."""
        everything = self.tokens * (self.past + self.tokens)
        return everything - self.tokens * (self.tokens - 1) / 2 if causal else everything


@dataclass
class Work:
    """Operations and bytes of one part."""

    operations: float = 0.0
    bytes: float = 0.0

    def seconds(self, accelerator: Accelerator) -> float:
        return max(self.operations / accelerator.operations, self.bytes / accelerator.bandwidth)


def layer_work(
    config: PretrainedConfig,
    work: Workload,
    levels: Mapping[str, str],
    capacity: float,
    kv_policy: str = "keep",
    causal: bool = True,
) -> Iterator[Work]:
    """The parts of one decoder layer: queries and output, keys and values, attention itself, MLP.

    Args:
        levels: by part (``{"attn": "token"}``; empty for a dense layer). capacity: share that runs. kv_policy:
            whether a token whose attention is skipped offers its key and value. causal: as for ``Workload.pairs``.
    """
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    attention, mlp = levels.get("block", levels.get("attn")), levels.get("block", levels.get("mlp"))
    tokens, size = work.batch * work.tokens, work.value_bytes
    state = 2 * kv_heads * width * size

    def share(level: str | None) -> float:
        return 1.0 if level is None else capacity

    def weights_read(level: str | None) -> float:
        """Probability that anything runs: one decision per row, or per token."""
        if level is None:
            return 1.0
        return 1 - (1 - capacity) ** (work.batch if level == "sequence" else tokens)

    kept = share(attention)
    dropped = attention == "token" and kv_policy == "drop"
    # A skipped sequence leaves no keys; a skipped token still offers its own, unless they are dropped.
    stored, offered = (kept, weights_read(attention)) if dropped or attention == "sequence" else (1.0, 1.0)
    queries = 2 * heads * width * hidden
    yield Work(2 * kept * tokens * queries, weights_read(attention) * queries * size)
    states = 2 * kv_heads * width * hidden
    yield Work(2 * stored * tokens * states, offered * states * size + stored * tokens * state)
    seen = kept if dropped else 1.0  # of the keys of a row that runs
    rows_read = 1 - (1 - capacity) ** work.tokens if attention == "token" else kept  # if any of its queries runs
    read = rows_read * work.batch * seen * (work.past + work.tokens) * state
    yield Work(kept * seen * work.batch * work.pairs(causal) * 4 * heads * width, read)
    inner = 3 * hidden * config.intermediate_size
    yield Work(2 * share(mlp) * tokens * inner, weights_read(mlp) * inner * size)


def model_work(
    config: PretrainedConfig, work: Workload, routing: ModConfig | None, capacity: float = 1.0, causal: bool = True
) -> list[Work]:
    """All parts of a model (dense without ``routing``), and its head on the last token of every row."""
    levels: list[dict[str, str]] = [{} for _ in range(config.num_hidden_layers)]
    for layer, part in routing.targets if routing else ():
        levels[layer][part] = routing.parts[part]
    policy = routing.kv_policy if routing else "keep"
    parts = [part for found in levels for part in layer_work(config, work, found, capacity, policy, causal)]
    head = config.hidden_size * config.vocab_size
    return [*parts, Work(2 * work.batch * head, head * work.value_bytes)]


def limit(
    config: PretrainedConfig, work: Workload, routing: ModConfig, capacity: float, accelerator: Accelerator
) -> dict[str, float]:
    """Highest speed-up, and shares of operations and bytes that are left, of a routed model against the dense one.

    Args:
        routing: with ``mod_layers``. A skip path is left out: the limit is that of the method without one.
    """
    dense, routed = model_work(config, work, None), model_work(config, work, routing, capacity)

    def ratio(cost: Callable[[Work], float]) -> float:
        return sum(map(cost, routed)) / sum(map(cost, dense))

    return {
        "dense_seconds": sum(part.seconds(accelerator) for part in dense),
        "speed_up_limit": 1 / ratio(lambda part: part.seconds(accelerator)),
        "operations_share": ratio(lambda part: part.operations),
        "bytes_share": ratio(lambda part: part.bytes),
    }


def limits_table(rows: list[dict], model: str) -> Table:
    """Speed-up limits of one model at capacity 0.5, a row per workload."""
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row["model"] == model and row["capacity"] == 0.5:
            key = (row["phase"], row["batch"], row["length"])
            cells.setdefault(key, {})[row["granularity"]] = f"{row['speed_up_limit']:.2f}×"
    return Table(
        ["workload", *GRANULARITIES],
        [[f"{phase} {b}×{t}", *[found.get(g) for g in GRANULARITIES]] for (phase, b, t), found in cells.items()],
    )
