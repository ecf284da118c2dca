"""Statistics over micro-batches of different sizes equal those over all sequences and tokens at once."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_batch
from tiny_routed import routed_model

from router_tuning.model import record_routing
from router_tuning.tuning.trainer.routing_statistics import RoutingStatistics, layer_key


def run(granularity, splits):
    model = routed_model(granularity=granularity).train()
    ids, mask = random_batch(rows=6)
    statistics = RoutingStatistics(torch.device("cpu"))
    decisions = []
    for part in torch.arange(6).split(splits):
        inputs = {"input_ids": ids[part], "attention_mask": mask[part]}
        with record_routing(model) as log:
            model(**inputs)
        decisions.append(dict(log.decisions))
        statistics.add(log, torch.tensor(0.25), log.penalty(0.5).detach(), inputs)
    return statistics, decisions, ids, mask


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "attn_sequence+mlp_token"])
def test_capacity_is_the_share_over_everything_seen(granularity):
    statistics, decisions, _, mask = run(granularity, [1, 2, 3])
    read = statistics.read(steps=1)
    for key in decisions[0]:
        kept = sum(int(part[key].sum()) for part in decisions)
        seen = 6 if decisions[0][key].dim() == 1 else int(mask.sum())
        assert read[layer_key(key)] == pytest.approx(kept / seen, abs=1e-6)
    shares = [read[layer_key(key)] for key in decisions[0]]
    assert read["capacity"] == pytest.approx(sum(shares) / len(shares), abs=1e-6)


def test_losses_padding_and_tokens():
    statistics, _, ids, mask = run("attn_sequence", [3, 3])
    read = statistics.read(steps=2)
    assert read["task_loss"] == pytest.approx(0.25), "two shares of a quarter in two steps"
    assert read["padding"] == pytest.approx(1 - int(mask.sum()) / ids.numel())
    assert read["tokens_per_second"] > 0 and read["memory_gb"] > 0
    assert statistics.sums == {}, "reading resets"
