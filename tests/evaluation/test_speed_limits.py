"""Operations and bytes behind the limits: against torch's counter, the cache's bytes, and cases that are plain."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import LAYERS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from router_tuning.model import force_routing, kv_cache_bytes, route
from router_tuning.speed.limits import ACCELERATORS, BYTES, Work, Workload, layer_work, limit, model_work

GRANULARITIES = ["attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token"]
ROWS, TOKENS = 4, 16
H200 = ACCELERATORS["h200"]


def half(granularity, tokens):
    kept = torch.arange(ROWS) % 2 == 0 if "sequence" in granularity else torch.arange(tokens) % 2 == 0
    return kept if "sequence" in granularity else kept.expand(ROWS, tokens).clone()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("capacity", [0.0, 0.5, 1.0])
def test_operations_are_those_that_torch_counts(granularity, capacity):
    model = route(tiny_model(), mod_layers=LAYERS, granularity=granularity)
    ids, _ = random_batch(ROWS, TOKENS)
    keep = half(granularity, TOKENS) if capacity == 0.5 else bool(capacity)
    mask = dict.fromkeys(LAYERS, keep) if capacity == 0.5 else keep
    with torch.no_grad(), force_routing(model, mask), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    work = Workload(ROWS, TOKENS, 0)
    parts = model_work(model.config, work, granularity, len(LAYERS), capacity, causal=False)
    assert counter.get_total_flops() == pytest.approx(sum(part.operations for part in parts), rel=1e-3)
    held = kv_cache_bytes(out.past_key_values) * BYTES / 4  # the tiny model's are float32
    width = model.config.hidden_size // model.config.num_attention_heads
    state = 2 * model.config.num_key_value_heads * width * BYTES
    kept = capacity if granularity in ("attn_sequence", "block_sequence") else 1.0
    assert held == ROWS * TOKENS * state * (model.config.num_hidden_layers - len(LAYERS) * (1 - kept))


def test_bytes_of_decoding_are_weights_and_cache():
    config = AutoConfig.for_model("llama", hidden_size=8, intermediate_size=16, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim = 1, 4
    weights = 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 16
    state = 2 * 4
    dense = sum(part.bytes for part in layer_work(config, Workload(3, 1, 9), {}, 1.0))
    assert dense == BYTES * (weights + 3 * state + 3 * 10 * state)


def test_a_weight_is_read_if_any_row_runs():
    config = AutoConfig.for_model("llama")
    alone, batch = ([*layer_work(config, Workload(b, 1, 0), {"mlp": "sequence"}, 0.5)][-1].bytes for b in (1, 8))
    assert batch == pytest.approx(alone * (1 - 0.5**8) / 0.5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("work", [Workload(1, 512, 0), Workload(8, 1, 8192)])
def test_skipping_never_costs_and_never_saves_more_than_the_layers(granularity, work):
    config = AutoConfig.for_model("llama", num_hidden_layers=8)
    speeds = [limit(config, work, granularity, 4, c, H200)["speed_up_limit"] for c in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert speeds[0] == pytest.approx(1.0) and speeds == sorted(speeds) and speeds[-1] <= 2.0 + 1e-9


def test_the_slower_of_arithmetic_and_memory_counts():
    assert Work(989e12, 0).seconds(H200) == pytest.approx(1.0) and Work(1.0, 4.8e12).seconds(H200) == pytest.approx(
        1.0
    )
