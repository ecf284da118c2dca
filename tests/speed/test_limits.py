"""Operations and bytes behind the limits: against torch's counter, the cache's bytes, and cases that are plain."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import LAYERS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from router_tuning.model import ModConfig, force_routing, kv_cache_bytes, route
from router_tuning.speed.limits import (
    ACCELERATORS,
    GRANULARITIES,
    Work,
    Workload,
    layer_work,
    limit,
    model_work,
)

ROWS, TOKENS = 4, 16
H200 = ACCELERATORS["h200"]


def half(level):
    kept = torch.arange(ROWS if level == "sequence" else TOKENS) % 2 == 0
    return kept if level == "sequence" else kept.expand(ROWS, TOKENS).clone()


@pytest.mark.parametrize("granularity, kv_policy", [*[(g, "keep") for g in GRANULARITIES], ("attn_token", "drop")])
@pytest.mark.parametrize("capacity", [0.0, 0.5, 1.0])
def test_operations_are_those_that_torch_counts(granularity, kv_policy, capacity):
    routing = ModConfig(mod_layers=LAYERS, granularity=granularity, kv_policy=kv_policy)
    model = route(tiny_model(), mod_layers=LAYERS, granularity=granularity, kv_policy=kv_policy)
    masks = {(layer, part): half(routing.parts[part]) for layer, part in routing.targets}
    mask = masks if capacity == 0.5 else bool(capacity)
    ids, _ = random_batch(ROWS, TOKENS)
    with torch.no_grad(), force_routing(model, mask), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    work = Workload(ROWS, TOKENS, 0, value_bytes=4)
    parts = model_work(model.config, work, routing, capacity, causal=False)
    assert counter.get_total_flops() == pytest.approx(sum(part.operations for part in parts), rel=1e-3)
    width = model.config.hidden_size // model.config.num_attention_heads
    state = 2 * model.config.num_key_value_heads * width * work.value_bytes
    stored = capacity if kv_policy == "drop" or granularity in ("attn_sequence", "block_sequence") else 1.0
    depth = model.config.num_hidden_layers - len(LAYERS) * (1 - stored)
    assert kv_cache_bytes(out.past_key_values) == ROWS * TOKENS * state * depth


def test_bytes_of_decoding_are_weights_and_cache():
    config = AutoConfig.for_model("llama", hidden_size=8, intermediate_size=16, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim = 1, 4
    weights = 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 16
    state = 2 * 4
    dense = sum(part.bytes for part in layer_work(config, Workload(3, 1, 9), {}, 1.0))
    assert dense == 2 * (weights + 3 * state + 3 * 10 * state)


def test_a_weight_is_read_if_any_row_runs():
    config = AutoConfig.for_model("llama")
    alone, batch = ([*layer_work(config, Workload(b, 1, 0), {"mlp": "sequence"}, 0.5)][-1].bytes for b in (1, 8))
    assert batch == pytest.approx(alone * (1 - 0.5**8) / 0.5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("work", [Workload(1, 512, 0), Workload(8, 1, 8192)])
def test_skipping_never_costs_and_never_saves_more_than_the_layers(granularity, work):
    config = AutoConfig.for_model("llama", num_hidden_layers=8)
    routing = ModConfig(mod_layers=[3, 4, 5, 6], granularity=granularity)
    speeds = [limit(config, work, routing, c, H200)["speed_up_limit"] for c in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert speeds[0] == pytest.approx(1.0) and speeds == sorted(speeds) and speeds[-1] <= 2.0 + 1e-9


@pytest.mark.parametrize("work", [Work(989e12, 0), Work(1.0, 4.8e12)])
def test_the_slower_of_arithmetic_and_memory_counts(work):
    assert work.seconds(H200) == pytest.approx(1.0)
