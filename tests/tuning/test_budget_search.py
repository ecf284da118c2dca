"""The mask search agrees with whole forward passes of the model under the same masks."""

from __future__ import annotations

import pytest
import torch
from tiny_routed import routed_model
from torch.nn.functional import cross_entropy

from router_tuning.errors import UserError
from router_tuning.model import force_routing, routed_modules
from router_tuning.model.router import pooled_mean
from router_tuning.tuning.recipes.budget.search import all_masks, explore, sample_masks


def batch_with_labels(rows=3, tokens=9):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 61, (rows, tokens), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        labels[row, : 3 + row] = -100
        if row:
            ids[row, -row:], mask[row, -row:], labels[row, -row:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def whole_pass(model, batch, mask):
    keys = [(m.mod_layer, m.mod_part) for m in routed_modules(model).values()]
    with torch.no_grad(), force_routing(model, {key: bool(bit) for key, bit in zip(keys, mask, strict=True)}):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    counted = labels != -100
    right = ((logits.argmax(-1) == labels) | ~counted).all(1)
    return -loss.sum(1) / counted.sum(1), right


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "granite", "phi", "qwen3", "cohere"])
def test_listed_masks_score_as_whole_passes(family):
    model = routed_model(family, attn="eager" if family == "gemma2" else "sdpa")
    batch = batch_with_labels()
    found = explore(model, [batch])
    assert found.masks.shape == (1, 8, 3) and found.likelihood.shape == (3, 8)
    for k, mask in enumerate(all_masks(3)):
        likelihood, right = whole_pass(model, batch, mask.tolist())
        torch.testing.assert_close(found.likelihood[:, k], likelihood, atol=2e-4, rtol=1e-4)
        assert found.exact[:, k].tolist() == right.tolist()


@pytest.mark.parametrize("granularity", ["mlp_sequence", "block_sequence", "attn_sequence+mlp_sequence"])
def test_every_sequence_granularity(granularity):
    model, batch = routed_model("llama", granularity), batch_with_labels()
    found = explore(model, [batch])
    routers = len(routed_modules(model))
    for k in (0, 1, 2 ** (routers - 1), 2**routers - 1):
        likelihood, _ = whole_pass(model, batch, all_masks(routers)[k].tolist())
        torch.testing.assert_close(found.likelihood[:, k], likelihood, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence", "attn_sequence+mlp_sequence"])
@pytest.mark.parametrize("max_masks", [64, 5])
def test_features_are_what_routers_see_under_a_mask(granularity, max_masks):
    model, batch = routed_model("llama", granularity), batch_with_labels()
    found = explore(model, [batch], max_masks=max_masks)
    routers = list(routed_modules(model).values())
    k, row = 3, 1
    mask = found.masks[0 if found.masks.shape[0] == 1 else row, k]
    seen = {}

    def watch(module, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen[module] = module.mod_features(hidden) if module.mod_part == "block" else hidden

    handles = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in routers]
    whole_pass(model, {key: value[row : row + 1] for key, value in batch.items()}, mask.tolist())
    for handle in handles:
        handle.remove()
    prompt = torch.arange(9)[None] < 3 + row
    for r, module in enumerate(routers):
        expected = pooled_mean(seen[module], prompt)[0]
        torch.testing.assert_close(found.features[r][row, found.states[r][k]].float(), expected, atol=5e-3, rtol=5e-3)


def test_sampled_masks_score_as_whole_passes():
    model, batch = routed_model("llama"), batch_with_labels()
    found = explore(model, [batch, batch], max_masks=4)
    assert found.masks.shape == (6, 4, 3)
    for row in range(3):
        for k in range(4):
            likelihood, _ = whole_pass(model, batch, found.masks[row, k].tolist())
            torch.testing.assert_close(found.likelihood[row, k], likelihood[row], atol=2e-4, rtol=1e-4)


def test_sampled_masks_have_the_stated_probability():
    masks, log_q = sample_masks(20_000, 3, 3, torch.Generator().manual_seed(0))
    drawn, stated = masks[:, 2].long() @ torch.tensor([4, 2, 1]), log_q[:, 2]
    for index in range(8):
        here = drawn == index
        assert abs(here.float().mean().item() - stated[here][0].exp().item()) < 0.01


def test_token_level_is_refused():
    with pytest.raises(UserError, match="sequence level"):
        explore(routed_model("llama", "attn_token"), [batch_with_labels()])


def test_the_model_is_left_as_it_was():
    model, batch = routed_model("llama"), batch_with_labels()
    with torch.no_grad():
        before = model(input_ids=batch["input_ids"]).logits
        explore(model, [batch])
        assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)
