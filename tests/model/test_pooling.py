"""What a sequence's decision looks at: its real tokens, or its prompt only (batch mates: test_equivalence)."""

from __future__ import annotations

import pytest
import torch
from refused import refused
from tiny_models import random_batch
from tiny_routed import LAYERS, routed_model

from router_tuning.model import prompt_length_from, record_routing

SEQUENCE = ["attn_sequence", "mlp_sequence", "block_sequence", "attn_sequence+mlp_sequence"]


def decisions(model, *args, **kwargs):
    with torch.no_grad(), record_routing(model) as log:
        output = model(*args, **kwargs)
    scores = torch.stack([log.scores[key] for key in log.scores])  # [routers, b]
    return scores, torch.stack(list(log.decisions.values())), output.logits


@pytest.mark.parametrize(
    ("granularity", "pad"), [*[(granularity, 0) for granularity in SEQUENCE], (SEQUENCE[0], None), (SEQUENCE[0], 5)]
)
def test_without_a_mask_every_token_is_real_whatever_its_id(granularity, pad):
    """``generate()`` drops a mask of ones: what a prompt ends in must not count less than in a padded batch."""
    model = routed_model("llama", granularity)
    model.config.pad_token_id = pad
    tail = torch.cat([random_batch(2, 8)[0], torch.tensor([[0, 0], [5, 0]])], 1)
    scores, keep, logits = decisions(model, tail)
    ones_scores, ones_keep, ones_logits = decisions(model, tail, attention_mask=torch.ones_like(tail))
    assert torch.equal(keep, ones_keep) and torch.allclose(scores, ones_scores) and torch.allclose(logits, ones_logits)
    batch, mask = torch.cat([torch.full((2, 3), 7), tail], 1), torch.ones(2, 13, dtype=torch.long)
    mask[:, :3] = 0
    assert torch.allclose(decisions(model, batch, attention_mask=mask)[0], scores, atol=1e-5)


def test_a_row_of_padding_alone_does_no_harm():
    model = routed_model()
    ids, mask = random_batch(2, 8)
    ids[1], mask[1] = 0, 0
    for given in (mask, None):
        scores, _, logits = decisions(model, ids, attention_mask=given)
        assert torch.isfinite(scores).all() and torch.isfinite(logits).all()
        assert torch.allclose(logits[0], decisions(model, ids[:1])[2][0], atol=1e-5)


# ---------------------------------------------------------------- the prompt alone


@pytest.mark.parametrize("granularity", SEQUENCE)
def test_prompt_pooling_decides_as_cached_generation_does(granularity):
    model = routed_model("llama", granularity, router_pooling="prompt")
    prompt, mask = random_batch(3, 10, padding="left")
    with record_routing(model) as log:
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    full = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1)
    scores, keep, logits = decisions(model, out, attention_mask=full, prompt_length=mask.sum(1))
    assert torch.equal(keep, torch.stack(list(log.decisions.values())))
    with torch.no_grad():
        held = model(prompt, attention_mask=mask).past_key_values
        steps = model(out[:, 10:], attention_mask=full, past_key_values=held).logits
    assert torch.allclose(logits[:, 10:], steps, atol=1e-4)
    assert not torch.allclose(decisions(model, out, attention_mask=full)[0], scores, atol=1e-6)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("training", [False, True])
def test_the_prompts_end_is_the_same_however_it_is_said(padding, training):
    model = routed_model("llama", router_pooling="prompt").train(training)
    ids, mask = random_batch(3, 12, padding=padding)
    labels = torch.where((torch.arange(12) >= 5) & mask.bool(), ids, -100)
    prompts = torch.where(torch.arange(12) < 5, mask, 0)
    pooled = routed_model("llama", router_pooling="sequence")
    expected = decisions(pooled, ids, attention_mask=prompts)[0][0]  # the first router sees no other layer's padding
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    given = {"input_ids": ids, "attention_mask": mask}
    for args, kwargs in [
        ((), {**given, "prompt_length": prompt_length_from(labels, mask)}),
        ((), {**given, "labels": labels}),
        ((), {**given, "shift_labels": shifted}),
        ((ids, mask), {"labels": labels}),
        ((ids, mask), {"shift_labels": shifted, "labels": None}),
    ]:
        with torch.set_grad_enabled(training), record_routing(model) as log:
            model(*args, **kwargs)
        assert torch.allclose(log.scores[LAYERS[0]], expected, atol=1e-5)


def test_prompt_length_counts_real_tokens():
    ids, mask = random_batch(3, 12, padding="left")
    labels = torch.where(torch.arange(12) >= 8, ids, -100)
    assert prompt_length_from(labels, mask).tolist() == [8, 6, 4]
    assert prompt_length_from(labels, None).tolist() == [8, 8, 8]
    assert prompt_length_from(labels[:, 1:], mask[:, :-1], shifted=True).tolist() == [8, 6, 4]
    assert prompt_length_from(torch.full((1, 4), -100), None).tolist() == [4]


@pytest.mark.parametrize(("pooling", "length"), [("prompt", 0), ("prompt", 99), ("sequence", 2)])
def test_boundaries_beyond_the_ends_and_where_nobody_asks_for_them(pooling, length):
    model = routed_model("llama", router_pooling=pooling)
    ids, mask = random_batch(3, 12, padding="left")
    first = torch.stack([ids[row, mask[row].bool()][:1] for row in range(3)])
    expected = decisions(model, first) if length == 0 else decisions(model, ids, attention_mask=mask)
    scores = decisions(model, ids, attention_mask=mask, prompt_length=torch.tensor([length] * 3))[0]
    depth = 1 if length == 0 else 3  # deeper layers have seen more than the first token
    assert torch.allclose(scores[:depth], expected[0][:depth], atol=1e-5)


@pytest.mark.parametrize("value", [torch.tensor([3]), torch.tensor([[3], [3], [3]]), torch.tensor([2.0, 3.0, 4.0]), 3])
def test_a_boundary_of_another_shape_is_refused(value):
    with refused("prompt_length"):
        routed_model("llama", router_pooling="prompt")(random_batch(3, 12)[0], prompt_length=value)


def test_training_on_prompts_that_end_nowhere_is_refused():
    ids, mask = random_batch(3, 12, padding="right")
    with refused("prompt_length.*labels"):
        routed_model("llama", router_pooling="prompt").train()(ids, attention_mask=mask)
    for model in (routed_model("llama", "attn_token", router_pooling="prompt"), routed_model("llama")):
        model.train()(ids, attention_mask=mask)
