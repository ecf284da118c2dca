"""``--mod_layers auto``: the modules that cost least per operation saved, and a model left as it was."""

import pytest
import torch
from tiny_models import random_batch, tiny_model

from router_tuning.model import ModConfig, is_routed
from router_tuning.tuning.placement import chosen_layers, importance


@pytest.mark.parametrize("granularity", ["attn_token+mlp_token", "attn_sequence+mlp_token", "block_sequence"])
def test_importance_of_every_candidate_is_measured_on_a_model_that_is_dense_again(granularity):
    model, (ids, mask) = tiny_model(), random_batch(rows=6, tokens=16, padding="right")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(0.01)
        model.model.layers[2].self_attn.o_proj.weight.mul_(0.01)
    before = model(ids, attention_mask=mask).logits
    config = ModConfig(mod_n=1, granularity=granularity, skip="low_rank", skip_rank=2)
    labels = ids.masked_fill(mask == 0, -100)
    found = importance(model, config, [{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    assert not is_routed(model) and torch.equal(model(ids, attention_mask=mask).logits, before)
    attention, others = ("0.attn 1.attn 2.attn 3.attn 4.attn", "1.{0} 2.{0} 3.{0} 4.{0}")
    names = others.format("block") if "block" in granularity else f"{attention} {others.format('mlp')}"
    assert set(found) == set(names.split())
    assert min(found, key=lambda name: found[name][0]).startswith("2.")


@pytest.mark.parametrize(
    ("count", "layers"),
    [
        (1, {"attn": [3], "mlp": [2]}),  # one of each part at least
        (3, {"attn": [0, 3], "mlp": [2]}),
        (4, {"attn": [0, 3], "mlp": [1, 2]}),
        (9, {"attn": [0, 3], "mlp": [1, 2]}),
    ],
)
def test_what_is_chosen_costs_least_per_operation_saved(count, layers):
    """An MLP saves three times what attention does, so it may cost twice as much."""
    found = {"0.attn": (0.2, 0.1), "3.attn": (0.1, 0.1), "1.mlp": (0.9, 0.3), "2.mlp": (0.2, 0.3)}
    assert chosen_layers(found, count) == layers
