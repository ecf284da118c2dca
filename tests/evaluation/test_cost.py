"""What routing saves, counted on models whose decisions are known."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoTokenizer

from router_tuning.evaluation import cost
from router_tuning.evaluation.cost import cache_bytes, measure_cost
from router_tuning.evaluation.rows import prompt_batches
from router_tuning.model import force_routing, route
from router_tuning.model.flops import count_flops

PROMPTS = ["<|user|>\nAdd 12 and 3.\n<|assistant|>\n", "<|user|>\nCopy.\nInput: ABC\n<|assistant|>\n", "Hi"]


@pytest.fixture
def batches(base):
    return prompt_batches(PROMPTS, AutoTokenizer.from_pretrained(base), batch_size=2)


@pytest.fixture
def pair():
    sizes = dict(vocab_size=300, max_position_embeddings=512)
    return tiny_model(**sizes), route(tiny_model(**sizes), mod_layers=[1, 2])


def attention_flops(model, batch):
    """4 projections and two products of attention, counted by hand: 2 operations per multiply-add."""
    c = model.config
    (b, t), d, kv = (
        batch["input_ids"].shape,
        c.hidden_size,
        c.hidden_size * c.num_key_value_heads // c.num_attention_heads,
    )
    return 2 * b * t * d * (2 * d + 2 * kv) + 2 * 2 * b * t * t * d


def test_flops_are_those_of_the_skipped_attention(pair, batches):
    dense, routed = pair
    for batch in batches:
        with force_routing(routed, {1: True, 2: False}):
            saved = count_flops(dense, batch) - count_flops(routed, batch)
        b, d = len(batch["input_ids"]), dense.config.hidden_size
        routers = 2 * 2 * b * d  # one product with W per sequence and router
        assert saved == pytest.approx(attention_flops(dense, batch) - routers, abs=routers)


def test_cache_bytes_are_those_of_the_kept_layers(pair, batches):
    dense, routed = pair
    layer = cache_bytes(dense, batches[0]) / dense.config.num_hidden_layers
    assert layer == 2 * batches[0]["input_ids"].numel() * 2 * 8 * 4  # keys and values, 2 heads of 8 floats
    with force_routing(routed, {1: True, 2: False}):
        assert cache_bytes(routed, batches[0]) == layer * (dense.config.num_hidden_layers - 1)


def test_measure_cost_reports_shares_and_times(pair, batches):
    dense, routed = pair
    with force_routing(routed, False):
        found = measure_cost(dense, routed, batches, new_tokens=3, repeats=2)
    assert found["capacity"]["total"] == 0 and found["prompts"] == 3
    assert found["prompt_tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert found["flops_share"] == found["flops_routed"] / found["flops_dense"] < 1
    assert found["kv_share"] == pytest.approx(3 / 5)
    for part in ("prefill", "generate"):
        assert found[part]["seconds_dense"] > 0 and found[part]["time_ratio"] > 0


def test_ratio_is_a_median_over_rounds_with_both_sides_in_each(pair, batches, monkeypatch):
    dense, routed = pair
    calls = []

    def seconds(model, batch, new_tokens):
        calls.append((model is routed, new_tokens))
        warm, drift = len(calls) > 2 * len(batches), 1 + len(calls) // (2 * len(batches))
        return (2.0 if model is routed else 4.0) * drift if warm else 100.0

    monkeypatch.setattr(cost, "_seconds", seconds)
    found = cost.interleaved_times(dense, routed, batches, 5, repeats=3, name="generate")
    assert len(calls) == 4 * 2 * len(batches) and {tokens for _, tokens in calls} == {5}
    assert [side for side, _ in calls].count(True) == len(calls) // 2
    assert found["time_ratio"] == pytest.approx(0.5, rel=0.2)


def test_batches_are_left_padded_and_complete(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    batches = prompt_batches(PROMPTS, tokenizer, batch_size=2)
    rows = [
        row[mask.bool()].tolist()
        for b in batches
        for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert sorted(rows) == sorted(tokenizer(text)["input_ids"] for text in PROMPTS)
    assert all(bool(b["attention_mask"][:, -1].all()) and b["input_ids"].dtype == torch.long for b in batches)
