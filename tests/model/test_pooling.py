"""What a sequence's decision looks at: its real tokens, or its prompt only (batch mates: test_equivalence)."""

import pytest
import torch
from refused import refused
from tiny_models import random_batch
from tiny_routed import routed_model

from router_tuning.model import prompt_length_from, record_routing

SEQUENCE = ["attn_sequence", "mlp_sequence", "block_sequence", "attn_sequence+mlp_sequence"]
IDS, MASK = random_batch(3, 12, padding="left")


def decisions(model, *args, **kwargs):
    """Scores and decisions ``[routers, b]``, and logits."""
    with record_routing(model) as log:
        output = model(*args, **kwargs)
    return torch.stack([*log.scores.values()]), torch.stack([*log.decisions.values()]), output.logits


@pytest.mark.parametrize(
    ("granularity", "pad"), [*[(granularity, 0) for granularity in SEQUENCE], (SEQUENCE[0], None), (SEQUENCE[0], 5)]
)
@torch.no_grad()
def test_without_a_mask_every_token_is_real_whatever_its_id(granularity, pad):
    """``generate()`` drops a mask of ones: what a prompt ends in must not count less than in a padded batch."""
    model = routed_model("llama", granularity)
    model.config.pad_token_id = pad
    tail = torch.cat([random_batch(2, 8)[0], torch.tensor([[0, 0], [5, 0]])], 1)
    without = decisions(model, tail)
    for found, expected in zip(decisions(model, tail, attention_mask=torch.ones_like(tail)), without, strict=True):
        torch.testing.assert_close(found, expected)
    padded, mask = torch.cat([torch.full((2, 3), 7), tail], 1), torch.ones(2, 13, dtype=torch.long)
    mask[:, :3] = 0
    assert torch.allclose(decisions(model, padded, attention_mask=mask)[0], without[0], atol=1e-5)


# ---------------------------------------------------------------- the prompt alone


@pytest.mark.parametrize("granularity", SEQUENCE)
@torch.no_grad()
def test_prompt_pooling_decides_as_cached_generation_does(granularity):
    model, prompt = routed_model("llama", granularity, router_pooling="prompt"), {"attention_mask": MASK}
    with record_routing(model) as log:
        out = model.generate(IDS, **prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    full = torch.cat([MASK, torch.ones(3, 6, dtype=torch.long)], 1)
    scores, keep, logits = decisions(model, out, attention_mask=full, prompt_length=MASK.sum(1))
    assert torch.equal(keep, torch.stack(list(log.decisions.values())))
    held = model(IDS, **prompt).past_key_values
    steps = model(out[:, 12:], attention_mask=full, past_key_values=held).logits
    assert torch.allclose(logits[:, 12:], steps, atol=1e-4)
    assert not torch.allclose(decisions(model, out, attention_mask=full)[0], scores, atol=1e-6)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("training", [False, True])
def test_the_prompts_end_is_the_same_however_it_is_said(padding, training):
    ids, mask = random_batch(3, 12, padding=padding)
    labels = torch.where((torch.arange(12) >= 5) & mask.bool(), ids, -100)
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    prompts = torch.where(torch.arange(12) < 5, mask, 0)
    with torch.set_grad_enabled(training):
        expected = decisions(routed_model("llama"), ids, attention_mask=prompts)[0]
        model = routed_model("llama", router_pooling="prompt").train(training)
        lengths = {"prompt_length": prompt_length_from(labels, mask)}
        for said in (
            lengths,
            {"labels": labels},
            {"shift_labels": shifted},
            {"shift_labels": shifted, "labels": None},
        ):
            for found in (decisions(model, ids, mask, **said), decisions(model, ids, attention_mask=mask, **said)):
                assert torch.allclose(found[0][0], expected[0], atol=1e-5)  # deeper ones see what follows the prompt


def test_prompt_length_counts_real_tokens():
    labels = torch.where(torch.arange(12) >= 8, IDS, -100)
    assert prompt_length_from(labels, MASK).tolist() == [8, 6, 4]
    assert prompt_length_from(labels, None).tolist() == [8, 8, 8]
    assert prompt_length_from(labels[:, 1:], MASK[:, :-1], shifted=True).tolist() == [8, 6, 4]
    assert prompt_length_from(torch.full((1, 4), -100), None).tolist() == [4]


@pytest.mark.parametrize(("pooling", "length"), [("prompt", 0), ("prompt", 99), ("sequence", 2)])
@torch.no_grad()
def test_boundaries_beyond_the_ends_and_where_nobody_asks_for_them(pooling, length):
    model, given = routed_model("llama", router_pooling=pooling), {"input_ids": IDS, "attention_mask": MASK}
    first = torch.stack([ids[mask.bool()][:1] for ids, mask in zip(IDS, MASK, strict=True)])
    expected = decisions(model, first) if length == 0 else decisions(model, **given)
    scores = decisions(model, **given, prompt_length=torch.tensor([length] * 3))[0]
    depth = 1 if length == 0 else 3  # deeper layers have seen more than the first token
    assert torch.allclose(scores[:depth], expected[0][:depth], atol=1e-5)


@pytest.mark.parametrize("value", [torch.tensor([3]), torch.tensor([[3], [3], [3]]), torch.tensor([2.0, 3.0, 4.0]), 3])
def test_a_boundary_of_another_shape_is_refused(value):
    with refused("prompt_length"):
        routed_model("llama", router_pooling="prompt")(IDS, prompt_length=value)


def test_training_on_prompts_that_end_nowhere_is_refused():
    with refused("prompt_length.*labels"):
        routed_model("llama", router_pooling="prompt").train()(IDS, attention_mask=MASK)
    for model in (routed_model("llama", "attn_token", router_pooling="prompt"), routed_model("llama")):
        model.train()(IDS, attention_mask=MASK)
