"""The regulariser in anyone's loop: each backward pass through a training forward carries λ·penalty exactly once.

That its gradient is that of the formula: test_gradient.
"""

import gc
import weakref

import pytest
import torch
from accelerate.state import GradientState
from tiny_models import random_batch, tiny_model
from tiny_routed import LAYERS, routed_model
from tiny_training import freeze_base, gradients, labels_of, same
from torch.nn.functional import cross_entropy

from router_tuning.model import capacity_penalty, record_routing, route
from router_tuning.model.recording import routed_base

SCALE, TARGET = 3.0, 0.1
IDS, MASK = random_batch(6, padding="right")
LABELS = labels_of(IDS, MASK)
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def regularised(granularity="attn_sequence", scale=SCALE):
    return freeze_base(routed_model("llama", granularity, gradient_scale=scale, target_capacity=TARGET))


def task_loss(logits, labels=LABELS):
    return cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


def by_hand(granularity="attn_sequence", rows=slice(None), scale=SCALE):
    """Gradients of ``task + λ·penalty`` of some rows, on a model that adds nothing itself."""
    model = regularised(granularity, scale=0.0)
    with record_routing(model) as log:
        task = task_loss(model(IDS[rows], attention_mask=MASK[rows]).logits, LABELS[rows])
    (task + scale * log.penalty(TARGET)).backward()
    return gradients(model)


def test_it_is_the_sum_over_layers_of_what_exceeds_the_target():
    model = routed_model("llama", "attn_token").train()
    with record_routing(model) as log:
        model(**BATCH)
    shares = {layer: float(keep[MASK.bool()].float().mean()) for layer, keep in log.decisions.items()}
    for target in (0.0, 0.3, 0.5, 1.0):
        assert log.penalty(target).item() == pytest.approx(sum(max(c - target, 0) for c in shares.values()), abs=1e-6)
    assert log.capacity() == pytest.approx({"total": sum(shares.values()) / 3, **shares})
    assert not any(value.requires_grad for value in log.capacity_tensors().values())


def with_logits(model):
    return task_loss(model(**BATCH).logits)


LOSSES = {
    "the model's": lambda m: m(**BATCH, labels=LABELS).loss,
    "a head of one's own": lambda m: task_loss(m.base_model(**BATCH).last_hidden_state @ m.lm_head.weight.T),
    "of the logits": with_logits,
    "beside the model's, which nobody uses": lambda m: task_loss(m(**BATCH, labels=LABELS).logits),
    "with the penalty added": lambda m: with_logits(m) + SCALE * capacity_penalty(m),
    "in a tuple": lambda m: m(**BATCH, labels=LABELS, return_dict=False)[0],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_whatever_computes_the_loss_it_counts_once(loss):
    model = regularised("attn_token+mlp_token")
    LOSSES[loss](model).backward()
    same(gradients(model), by_hand("attn_token+mlp_token"), tolerance=1e-5)


def test_micro_batches_weigh_as_their_tokens_do_where_the_trainer_counts_them():
    model, halves = regularised(), (slice(0, 2), slice(2, 6))
    counts = [int((LABELS[rows, 1:] != -100).sum()) for rows in halves]
    for rows in halves:
        inputs = {"attention_mask": MASK[rows], "labels": LABELS[rows], "num_items_in_batch": sum(counts)}
        model(IDS[rows], **inputs).loss.backward()
    first, second = (by_hand(rows=rows) for rows in halves)
    share = counts[0] / sum(counts)
    same(gradients(model), {n: share * first[n] + (1 - share) * second[n] for n in first}, tolerance=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_outside_a_loss_one_micro_batch_of_a_step_carries_it(last):
    """The last, as accelerate says: the others would multiply λ by their number."""
    model = regularised()
    GradientState()._set_sync_gradients(last)
    try:
        with_logits(model).backward()
    finally:
        GradientState()._set_sync_gradients(True)
    same(gradients(model), by_hand(scale=SCALE if last else 0.0), tolerance=1e-5)


def test_a_loss_that_is_scaled_for_float16_must_hold_the_term():
    model = regularised()
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(ValueError, match="float16.*bfloat16"):
            with_logits(model).backward()
        model(**BATCH, labels=LABELS).loss.backward()


def test_without_a_scale_the_loss_is_the_familys():
    model = freeze_base(route(tiny_model(), mod_layers=LAYERS))
    assert torch.equal(model(**BATCH, labels=LABELS).loss, tiny_model().train()(**BATCH, labels=LABELS).loss)
    with torch.no_grad():
        assert "mod_penalty" not in model(IDS, labels=IDS)
        assert "mod_penalty" not in model.eval()(IDS, labels=IDS)


def test_no_graph_outlives_the_outputs_of_its_pass():
    model = regularised()
    kept = set(vars(routed_base(model)))
    out = model(**BATCH, labels=LABELS)
    assert capacity_penalty(model) is out.mod_penalty is out["mod_penalty"]
    alive, loss = weakref.ref(out.logits), out.loss
    del out
    assert float(capacity_penalty(model).detach()) > 0  # alive with the loss
    gc.disable()
    try:
        del loss
        assert alive() is None and set(vars(routed_base(model))) == kept
    finally:
        gc.enable()
    with torch.no_grad():
        model.eval()(IDS)
    with pytest.raises(ValueError, match="no forward pass of this model in training"):
        capacity_penalty(model)
