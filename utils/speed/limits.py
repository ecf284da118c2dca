"""What skipping can save at best on an accelerator, from floating-point operations and bytes alone.

A roofline: every part of a layer takes ``max(operations / peak, bytes / bandwidth)``, parts follow one another,
nothing else costs anything. Bytes are weights (read once per pass if any row runs the part) and keys and values
(written once, and read by every query's pass over the cache); activations are left out, so that these are upper
bounds of the speed-up. Measured speed-ups beyond them would have another cause than the skipped work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from router_tuning.evaluation.tables import Table
from router_tuning.model.configuration_mod import parse_granularity

GRANULARITIES = ("attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token")
BYTES = 2  # of a weight, key or value in bfloat16


@dataclass(frozen=True)
class Accelerator:
    """Peak dense bfloat16 operations per second, and memory bytes per second."""

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
    """``batch`` rows of ``tokens`` new tokens behind ``past`` cached ones, under uniformly random decisions."""

    batch: int
    tokens: int
    past: int

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
    config: PretrainedConfig, work: Workload, routing: dict[str, str], capacity: float, causal: bool = True
) -> Iterator[Work]:
    """The parts of one decoder layer: queries and output, keys and values, attention itself, MLP.

    Args:
        routing: level by part (``{"attn": "token"}``; empty for a dense layer). capacity: share that runs. Keys of
            skipped tokens are kept (``kv_policy="keep"``).
    """
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    attention, mlp = routing.get("block", routing.get("attn")), routing.get("block", routing.get("mlp"))
    tokens, state = work.batch * work.tokens, 2 * kv_heads * width * BYTES

    def share(level: str | None) -> float:
        return 1.0 if level is None else capacity

    def weights_read(level: str | None) -> float:
        """Probability that anything runs: one decision per row, or per token."""
        if level is None:
            return 1.0
        return 1 - (1 - capacity) ** (work.batch if level == "sequence" else tokens)

    kept = share(attention)
    # Only a whole sequence leaves no keys: a skipped token still offers its own.
    stored, offered = (kept, weights_read(attention)) if attention == "sequence" else (1.0, 1.0)
    queries = 2 * heads * width * hidden
    yield Work(2 * kept * tokens * queries, weights_read(attention) * queries * BYTES)
    states = 2 * kv_heads * width * hidden
    yield Work(2 * stored * tokens * states, offered * states * BYTES + stored * tokens * state)
    read = kept * work.batch * (work.past + work.tokens) * state
    if attention == "token":  # a row's cache is read if any of its queries runs
        read = (1 - (1 - capacity) ** work.tokens) * work.batch * (work.past + work.tokens) * state
    yield Work(kept * work.batch * work.pairs(causal) * 4 * heads * width, read)
    inner = 3 * hidden * config.intermediate_size
    yield Work(2 * share(mlp) * tokens * inner, weights_read(mlp) * inner * BYTES)


def model_work(
    config: PretrainedConfig, work: Workload, granularity: str | None, n: int, capacity: float, causal: bool = True
) -> list[Work]:
    """All parts of a model with ``n`` routed layers, and its head on the last token of every row."""
    routing = parse_granularity(granularity) if granularity else {}
    parts = [part for _ in range(config.num_hidden_layers - n) for part in layer_work(config, work, {}, 1.0, causal)]
    parts += [part for _ in range(n) for part in layer_work(config, work, routing, capacity, causal)]
    head = config.hidden_size * config.vocab_size
    return [*parts, Work(2 * work.batch * head, head * BYTES)]


def limit(
    config: PretrainedConfig, work: Workload, granularity: str, n: int, capacity: float, accelerator: Accelerator
) -> dict[str, float]:
    """Highest speed-up, and shares of operations and bytes that are left, of a routed model against the dense one."""
    dense, routed = model_work(config, work, None, 0, 1.0), model_work(config, work, granularity, n, capacity)
    sums = [
        (
            sum(part.seconds(accelerator) for part in parts),
            sum(part.operations for part in parts),
            sum(part.bytes for part in parts),
        )
        for parts in (dense, routed)
    ]
    (dense_seconds, *dense_costs), (seconds, *costs) = sums
    return {
        "dense_seconds": dense_seconds,
        "speed_up_limit": dense_seconds / seconds,
        "operations_share": costs[0] / dense_costs[0],
        "bytes_share": costs[1] / dense_costs[1],
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
