"""What routing saves, counted on models whose decisions are known."""

from __future__ import annotations

import pytest
from tiny_models import random_batch, tiny_model

from router_tuning.evaluation import cost
from router_tuning.evaluation.cost import cache_bytes, measure_cost
from router_tuning.model import flops_share, force_routing, route


@pytest.fixture
def batches():
    return [
        dict(zip(("input_ids", "attention_mask"), random_batch(rows=2, tokens=n, padding="left"), strict=True))
        for n in (6, 9)
    ]


@pytest.fixture
def pair():
    return tiny_model(), route(tiny_model(), mod_layers=[1, 2])


def test_cache_bytes_are_those_of_the_kept_layers(pair, batches):
    dense, routed = pair
    layer = cache_bytes(dense, batches[0]) / dense.config.num_hidden_layers
    assert layer == 2 * batches[0]["input_ids"].numel() * 2 * 8 * 4  # keys and values, 2 heads of 8 floats
    with force_routing(routed, {1: True, 2: False}):
        assert cache_bytes(routed, batches[0]) == layer * (dense.config.num_hidden_layers - 1)


def test_cost_reports_shares_and_times(pair, batches):
    dense, routed = pair
    found = measure_cost(dense, routed, batches, new_tokens=3, repeats=2, under=force_routing(routed, False))
    assert found["capacity"] == {"1.attn": 0, "2.attn": 0} and found["prompts"] == 4
    assert found["prompt_tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert found["share"] == pytest.approx(flops_share(routed, 0.0)) and found["kv_share"] == pytest.approx(3 / 5)
    for part in ("prefill", "generate"):
        assert found[part]["seconds_dense"] > 0 and found[part]["time_ratio"] > 0


def test_times_are_medians_over_rounds_with_both_sides_in_each(pair, batches, monkeypatch):
    dense, routed = pair
    calls = []

    def seconds(model, batch, new_tokens):
        calls.append((model is routed, new_tokens))
        warm, drift = len(calls) > 2 * len(batches), 1 + len(calls) // (2 * len(batches))
        return (2.0 if model is routed else 4.0) * drift if warm else 100.0

    monkeypatch.setattr(cost, "_seconds", seconds)
    found = cost.interleaved_times(dense, routed, batches, 5, repeats=3)
    assert len(calls) == 4 * 2 * len(batches) and {tokens for _, tokens in calls} == {5}
    assert [side for side, _ in calls].count(True) == len(calls) // 2
    assert found["time_ratio"] == found["seconds_routed"] / found["seconds_dense"] == pytest.approx(0.5, rel=0.2)
