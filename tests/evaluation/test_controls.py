"""Fixed and random masks do what they say; importance finds the module that changes least."""

from __future__ import annotations

import torch
from tiny_models import random_batch
from tiny_routed import routed_model

from router_tuning.evaluation import controls
from router_tuning.evaluation.static_drop import answer_loss
from router_tuning.model import record_routing


def batches():
    ids, mask = random_batch(rows=4, tokens=10, padding="left")
    labels = ids.clone()
    labels[:, :7] = -100
    return [{"input_ids": ids, "attention_mask": mask, "labels": labels}]


def test_fixed_masks_run_what_is_named():
    model = routed_model("llama", "attn_sequence+mlp_sequence")
    kept = controls.routers_of(model)[1:3]
    with controls.fixed(model, kept), record_routing(model) as log, torch.no_grad():
        model(**{k: v for k, v in batches()[0].items() if k != "labels"}, use_cache=False)
    assert {key for key, keep in log.decisions.items() if keep.all()} == set(kept)
    assert all(keep.all() or not keep.any() for keep in log.decisions.values())


def test_random_masks_have_the_capacity_and_follow_the_seed():
    model = routed_model("llama", "attn_token")
    ids, mask = random_batch(rows=64, tokens=30)
    shares = []
    for seed in (0, 0, 1):
        with controls.random_masks(model, 0.3, seed), record_routing(model) as log, torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        shares.append(log.capacity()["total"])
    assert shares[0] == shares[1] != shares[2]
    assert abs(shares[0] - 0.3) < 0.02


def test_greedy_drops_first_what_costs_least():
    model = routed_model("llama")
    data = batches()
    order = controls.greedy_order(model, data)
    keys = controls.routers_of(model)
    losses = {}
    for key in keys:
        with controls.fixed(model, [other for other in keys if other != key]):
            losses[key] = answer_loss(model, data)
    assert order[0] == min(losses, key=losses.get) and sorted(order) == keys


def test_cosine_importance_ranks_a_module_that_adds_nothing_first():
    for granularity, silent in (("attn_sequence", "self_attn.o_proj"), ("mlp_sequence", "mlp.down_proj")):
        model = routed_model("llama", granularity)
        layer = model.model.layers[2]
        torch.nn.init.zeros_(layer.get_submodule(silent).weight)
        assert controls.cosine_order(model, batches())[0][0] == 2


def test_random_fixed_masks_have_the_size():
    model = routed_model("llama")
    assert len(controls.random_fixed(model, 2, 0)) == 2
