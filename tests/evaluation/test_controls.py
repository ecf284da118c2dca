"""Controls run what they say, at the operations that they say; modules go in the order of what they cost."""

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import routed_model

from router_tuning.evaluation.controls import Removed, random_masks, removal_order, removed
from router_tuning.evaluation.texts import compare_texts, executed
from router_tuning.model import force_routing, record_routing, routed_modules
from router_tuning.model.flops import saved_shares
from router_tuning.tuning.batching import Collator


class Pad:
    pad_token_id = 0


def documents(rows=5, tokens=12):
    ids, _ = random_batch(rows=rows, tokens=tokens)
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids.tolist()]


@torch.no_grad()
def ran(model, context, rows=64, tokens=30):
    ids, mask = random_batch(rows=rows, tokens=tokens)
    with context, record_routing(model) as log:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return executed(model, log)


def test_random_masks_have_each_modules_rate_and_follow_the_seed():
    model = routed_model("llama", "attn_token+mlp_token")
    rates = {name: 0.2 + 0.1 * place for place, name in enumerate(routed_modules(model))}
    shares = [ran(model, random_masks(model, rates, seed))["capacity"] for seed in (0, 0, 1)]
    assert shares[0] == shares[1] != shares[2]
    assert shares[0] == pytest.approx(rates, abs=0.04)


def test_removal_goes_by_divergence_per_operation():
    dense, model = tiny_model("llama"), routed_model("llama", "attn_sequence+mlp_sequence")
    found, collate = documents(), Collator(Pad())
    order = removal_order(dense, model, found, collate, candidates=100)
    saved, gone, left = saved_shares(model), [], 1.0
    for step in order:  # greedy, one full look at every step
        kl = {}
        for name in saved.keys() - set(gone):
            with force_routing(model, {m.mod_key: n not in [*gone, name] for n, m in routed_modules(model).items()}):
                kl[name] = compare_texts(dense, model, found, collate)["kl"]
        before = order[len(gone) - 1].kl if gone else 0.0
        best = min(kl, key=lambda name: (kl[name] - before) / saved[name])
        left -= saved[best]
        assert step.name == best and step.kl == pytest.approx(kl[best], rel=0.02) and step.share == pytest.approx(left)
        gone.append(best)
    assert sorted(gone) == sorted(saved)
    assert removal_order(dense, model, found, collate, share=order[1].share + 1e-6) == order[:2]


@pytest.mark.parametrize("share", [1.0, 0.93, 0.72])
def test_removal_leaves_the_share_that_is_asked_for(share):
    model = routed_model("llama", "attn_sequence+mlp_sequence")
    left, order = 1.0, []
    for name, saved in saved_shares(model).items():
        left -= saved
        order.append(Removed(name, 0.0, left))
    found = ran(model, removed(model, order, share), rows=400, tokens=6)
    assert found["share"] == pytest.approx(share, abs=0.01)
    assert sum(0 < value < 1 for value in found["capacity"].values()) == (share < 1)
    with pytest.raises(ValueError, match="leaves more"):
        removed(model, order, 0.01)
