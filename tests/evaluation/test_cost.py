"""What routing saves, counted on models whose decisions are known."""

import pytest
import torch
from tiny_models import random_batch, tiny_model

from router_tuning.evaluation import cost
from router_tuning.model import flops_share, force_routing, route

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def batches():
    found = [random_batch(rows=2, tokens=n, padding="left") for n in (6, 9)]
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in found]


@pytest.fixture
def pair():
    return tiny_model(), route(tiny_model(), mod_layers=[1, 2])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_cost_reports_shares_bytes_and_times(pair, batches, device):
    dense, routed = (model.to(device) for model in pair)
    found = cost.measure_cost(dense, routed, batches, new_tokens=3, repeats=2, under=force_routing(routed, False))
    assert found["capacity"] == {"1.attn": 0, "2.attn": 0} and found["prompts"] == 4
    assert found["prompt_tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert found["share"] == found["generate"]["share"] == pytest.approx(flops_share(routed, 0.0))
    assert found["kv_share"] == pytest.approx(3 / 5)
    places = sum(batch["input_ids"].numel() for batch in batches)
    assert found["kv_bytes_dense"] == 5 * 2 * places * 2 * 8 * 4  # layers; keys and values, 2 heads of 8 floats
    for part in ("prefill", "generate"):
        assert found[part]["seconds_dense"] > 0 and found[part]["time_ratio"] > 0


def test_times_are_medians_over_rounds_with_both_sides_in_each(pair, batches, monkeypatch):
    seconds = iter([100.0, 100.0, 8.0, 4.0, 3.0, 9.0, 7.0, 5.0] + [1.0] * 8)  # dense first in every other round
    monkeypatch.setattr(cost, "timed", lambda run, device: next(seconds))
    found = cost.measure_cost(*pair, batches, new_tokens=2, repeats=3)["prefill"]
    expected = {"share": 1.0, "seconds_dense": 4.0, "seconds_routed": 8.0, "time_ratio": 2.0}
    assert found == expected, "without the first round"
