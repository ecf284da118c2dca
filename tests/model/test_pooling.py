"""What a sequence's decision looks at: its real tokens, alone, or its prompt only; never its batch mates."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import KINDS, LAYERS, routed_model

from router_tuning.model import prompt_length_from, record_routing, route

SEQUENCE = ["attn_sequence", "mlp_sequence", "block_sequence", "attn_sequence+mlp_sequence"]


def decisions(model, *args, **kwargs):
    with torch.no_grad(), record_routing(model) as log:
        output = model(*args, **kwargs)
    scores = torch.stack([log.scores[key] for key in log.scores])  # [routers, b]
    return scores, torch.stack(list(log.decisions.values())), output.logits


def padded(ids, left, right, width):
    """One sequence among padding of any id: ``[1, width]`` and its mask."""
    row, mask = torch.full((1, width), 7), torch.zeros(1, width, dtype=torch.long)
    row[0, left : width - right], mask[0, left : width - right] = ids[0], 1
    return row, mask


@pytest.mark.parametrize("granularity", SEQUENCE)
def test_padding_never_counts(granularity):
    model = routed_model("llama", granularity)
    for seed in range(4):
        ids, _ = random_batch(1, 8, seed=seed)
        scores, keep, logits = decisions(model, ids)
        for left, right in ((3, 0), (0, 3), (2, 2), (9, 0), (0, 9)):
            row, mask = padded(ids, left, right, 8 + left + right)
            padded_scores, padded_keep, padded_logits = decisions(model, row, attention_mask=mask)
            assert torch.equal(padded_keep, keep)
            assert torch.allclose(padded_scores, scores, atol=1e-5)
            assert torch.allclose(padded_logits[:, left : left + 8], logits, atol=1e-4)


@pytest.mark.parametrize(("granularity", "policy"), [*KINDS, ("attn_token+mlp_token", "keep")])
def test_a_result_does_not_depend_on_batch_mates(granularity, policy):
    model = routed_model("llama", granularity, kv_policy=policy)
    ids, mask = random_batch(5, 14, padding="left")
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        shuffled = torch.tensor([3, 1, 4, 0, 2])
        assert torch.allclose(
            model(ids[shuffled], attention_mask=mask[shuffled]).logits, together[shuffled], atol=1e-5
        )
        for row in range(5):
            alone = model(ids[row : row + 1, mask[row].bool()]).logits
            assert torch.allclose(together[row, mask[row].bool()], alone[0], atol=1e-4)


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
    batch, mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), tail], 1), torch.ones(2, 13, dtype=torch.long)
    mask[:, :3] = 0
    assert torch.allclose(decisions(model, batch, attention_mask=mask)[0], scores, atol=1e-5)


@pytest.mark.parametrize(
    ("granularity", "cuts"),
    [
        *[(granularity, (5, 9, 12)) for granularity in SEQUENCE],
        (SEQUENCE[0], (3, 12)),
        (SEQUENCE[0], (1, 2, 3, 4, 12)),
    ],
)
def test_a_chunk_of_padding_decides_nothing(granularity, cuts):
    """Left-padded rows of a prefill in chunks are decided on in the chunk that brings their first token."""
    model = routed_model("llama", granularity)
    ids, mask = random_batch(4, 12, padding="left")  # 0, 2, 4, 6 tokens of padding
    cache, start, keep, logits = None, 0, {}, []
    for end in cuts:
        with torch.no_grad(), record_routing(model) as log:
            out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        for layer, records in log.records.items():
            for record in records:
                real = torch.ones(4, dtype=torch.bool) if record.real is None else record.real
                for row in real.nonzero().flatten().tolist():
                    assert keep.setdefault((layer, row), (end, bool(record.keep[row])))[0] == end, "decided once"
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    logits = torch.cat(logits, 1)
    for row in range(4):
        pads = 2 * row
        first = next(end for end in cuts if end > pads)
        alone_cache, begin, alone = None, pads, []
        for end in (end for end in cuts if end > pads):
            with torch.no_grad(), record_routing(model) as log:
                out = model(
                    ids[row : row + 1, begin:end],
                    position_ids=torch.arange(begin, end)[None],
                    past_key_values=alone_cache,
                )
            if end == first:
                assert {k[0]: v for k, v in keep.items() if k[1] == row} == {
                    layer: (first, bool(decision[0])) for layer, decision in log.decisions.items()
                }
            alone_cache, begin = out.past_key_values, end
            alone.append(out.logits)
        assert torch.allclose(logits[row, pads:], torch.cat(alone, 1)[0], atol=1e-4)


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
    expected = torch.stack(list(log.decisions.values()))
    full = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1)
    labels = torch.where(torch.arange(16) >= 10, out, -100)
    for boundary in ({"prompt_length": mask.sum(1)}, {"labels": labels}):
        scores, keep, logits = decisions(model, out, attention_mask=full, **boundary)
        assert torch.equal(keep, expected)
        held = model(prompt, attention_mask=mask).past_key_values
        with torch.no_grad():
            steps = model(out[:, 10:], attention_mask=full, past_key_values=held).logits
        assert torch.allclose(logits[:, 10:], steps, atol=1e-4)
    assert not torch.allclose(decisions(model, out, attention_mask=full)[0], scores, atol=1e-6)


def boundaries(ids, mask, labels):
    """All ways in which a batch says where its prompts end: ``(positional, keyword)`` arguments."""
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    plain = {"input_ids": ids, "attention_mask": mask}
    return [
        ((), {**plain, "prompt_length": prompt_length_from(labels, mask)}),
        ((), {**plain, "labels": labels}),
        ((ids, mask), {"labels": labels}),
        ((), {**plain, "shift_labels": shifted}),
        ((ids, mask), {"shift_labels": shifted, "labels": None}),
    ]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("training", [False, True])
def test_the_prompts_end_is_the_same_however_it_is_said(padding, training):
    model = routed_model("llama", router_pooling="prompt").train(training)
    ids, mask = random_batch(3, 12, padding=padding)
    labels = torch.where((torch.arange(12) >= 5) & mask.bool(), ids, -100)
    prompts = torch.where(torch.arange(12) < 5, mask, 0)
    pooled = routed_model("llama", router_pooling="sequence")
    expected = decisions(pooled, ids, attention_mask=prompts)[0][0]  # the first router sees no other layer's padding
    for args, kwargs in boundaries(ids, mask, labels):
        with torch.set_grad_enabled(training), record_routing(model) as log:
            model(*args, **kwargs)
        assert torch.allclose(log.scores[LAYERS[0]], expected, atol=1e-5)


def test_training_on_prompts_that_end_nowhere_is_refused():
    model = routed_model("llama", router_pooling="prompt").train()
    ids, mask = random_batch(3, 12, padding="right")
    with pytest.raises(ValueError, match="prompt_length.*labels") as error:
        model(ids, attention_mask=mask)
    assert "\n" not in str(error.value)
    for model in (routed_model("llama", "attn_token", router_pooling="prompt"), routed_model("llama")):
        model.train()(ids, attention_mask=mask)


def test_sequence_pooling_ignores_the_boundary():
    model = routed_model("llama", router_pooling="sequence")
    ids, mask = random_batch(3, 12, padding="left")
    expected = decisions(model, ids, attention_mask=mask)[0]
    labels = torch.where(torch.arange(12) >= 8, ids, -100)
    for boundary in ({"prompt_length": torch.tensor([1, 2, 3])}, {"labels": labels}):
        assert torch.equal(decisions(model, ids, attention_mask=mask, **boundary)[0], expected)


def test_prompt_length_counts_real_tokens():
    ids, mask = random_batch(3, 12, padding="left")
    labels = torch.where(torch.arange(12) >= 8, ids, -100)
    assert prompt_length_from(labels, mask).tolist() == [8, 6, 4]
    assert prompt_length_from(labels, None).tolist() == [8, 8, 8]
    assert prompt_length_from(labels[:, 1:], mask[:, :-1], shifted=True).tolist() == [8, 6, 4]
    assert prompt_length_from(torch.full((1, 4), -100), None).tolist() == [4]


@pytest.mark.parametrize("length", [torch.tensor([0, 0, 0]), torch.tensor([99, 99, 99])])
def test_boundaries_beyond_the_ends(length):
    model = routed_model("llama", router_pooling="prompt")
    ids, mask = random_batch(3, 12, padding="left")
    scores, _, _ = decisions(model, ids, attention_mask=mask, prompt_length=length)
    first = torch.stack([ids[row, mask[row].bool()][:1] for row in range(3)])
    expected = decisions(model, first)[0] if length[0] == 0 else decisions(model, ids, attention_mask=mask)[0]
    assert torch.allclose(scores[:1], expected[:1], atol=1e-5)  # deeper layers have seen more than the first token


@pytest.mark.parametrize("value", [torch.tensor([3]), torch.tensor([[3], [3], [3]]), torch.tensor([2.0, 3.0, 4.0]), 3])
def test_a_boundary_of_another_shape_is_refused(value):
    model = routed_model("llama", router_pooling="prompt")
    with pytest.raises(ValueError, match="prompt_length") as error:
        model(random_batch(3, 12)[0], prompt_length=value)
    assert "\n" not in str(error.value)


def test_threshold_is_inclusive_and_zero_routers_keep_everything():
    model = route(tiny_model(), mod_layers=LAYERS, threshold=0.5)
    assert decisions(model, random_batch()[0])[1].all()
    model = route(tiny_model(), mod_layers=LAYERS, threshold=0.5001)
    assert not decisions(model, random_batch()[0])[1].any()
