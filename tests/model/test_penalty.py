"""The regulariser in anyone's loop: each backward pass through a training forward carries λ·penalty exactly once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from accelerate.state import GradientState
from tiny_models import random_batch, tiny_model
from tiny_routed import CASES, LAYERS, routed_model
from tiny_training import dense_answers, freeze_base, gradients, labels_of, same
from torch.nn.functional import cross_entropy

from router_tuning.model import capacity_penalty, record_routing, route, routed_modules
from router_tuning.model.recording import routed_base

SCALE, TARGET = 3.0, 0.1
IDS, MASK = random_batch(6, padding="right")
LABELS = labels_of(IDS, MASK)
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def regularised(family="llama", granularity="attn_sequence", scale=SCALE, **options):
    options = {"gradient_scale": scale, "target_capacity": TARGET, **options}
    return freeze_base(routed_model(family, granularity, **options))


def task_loss(logits, labels=LABELS):
    return cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


def by_hand(*case, rows=slice(None), scale=SCALE, **options):
    """Gradients of ``task + λ·penalty``, task and penalty, on a model that adds nothing itself."""
    model = regularised(*case, scale=0.0, **options)
    with record_routing(model) as log:
        task = task_loss(model(IDS[rows], attention_mask=MASK[rows]).logits, LABELS[rows])
    penalty = log.penalty(TARGET)
    (task + scale * penalty).backward()
    return gradients(model), task, penalty


def test_it_is_the_sum_over_layers_of_what_exceeds_the_target():
    model = routed_model("llama", "attn_token").train()
    with record_routing(model) as log:
        model(**BATCH)
    shares = {layer: float(keep[MASK.bool()].float().mean()) for layer, keep in log.decisions.items()}
    for target in (0.0, 0.3, 0.5, 1.0):
        assert log.penalty(target).item() == pytest.approx(sum(max(c - target, 0) for c in shares.values()), abs=1e-6)
    assert log.capacity() == pytest.approx({"total": sum(shares.values()) / 3, **shares})
    assert not any(value.requires_grad for value in log.capacity_tensors().values())


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "block_token", "mlp_sequence"])
@pytest.mark.parametrize("target", [0.1, 0.9])
def test_its_gradient_by_hand(granularity, target):
    """``∂/∂W ReLU(c − target)`` is the mean of ``s(1−s)·h`` over real rows or tokens, above the target."""
    model, features = routed_model("llama", granularity, mod_layers=[2]).train(), []
    [module] = routed_modules(model).values()
    module.mod_router.register_forward_pre_hook(lambda _, args: features.append(args[0].detach()))
    with record_routing(model) as log:
        model(**BATCH)
    log.penalty(target).backward()
    [h], router = features, module.mod_router.weight
    score = torch.sigmoid(h @ router.detach().T)
    slope = score * (1 - score) * h
    expected = slope.mean(0) if h.dim() == 2 else slope[MASK.bool()].mean(0)
    assert (log.capacity()["total"] > target) == (target == 0.1)
    assert torch.allclose(router.grad[0], expected * (target == 0.1), atol=1e-6)


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "checkpointing"),
    [*[(*case, False) for case in CASES], *[(*case, True) for case in CASES[::3]]],
)
def test_a_forward_that_gets_labels_adds_it_and_gives_it(family, granularity, policy, checkpointing):
    theirs, task, penalty = by_hand(family, granularity, kv_policy=policy)
    model = regularised(family, granularity, kv_policy=policy)
    if checkpointing:
        model.gradient_checkpointing_enable()
    out = model(**BATCH, labels=LABELS)
    assert 0 < penalty and torch.allclose(out.mod_penalty, penalty)
    assert torch.allclose(out.loss, task + SCALE * penalty) and out["mod_penalty"] is out.mod_penalty
    out.loss.backward()
    same(gradients(model), theirs, tolerance=1e-5)


def with_logits(model):
    return task_loss(model(**BATCH).logits)


LOSSES = {
    "a head of one's own": lambda m: task_loss(m.base_model(**BATCH).last_hidden_state @ m.lm_head.weight.T),
    "of the logits": with_logits,
    "beside the model's, which nobody uses": lambda m: task_loss(m(**BATCH, labels=LABELS).logits),
    "with the penalty added": lambda m: with_logits(m) + SCALE * capacity_penalty(m),
    "in a tuple": lambda m: m(**BATCH, labels=LABELS, return_dict=False)[0],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_whatever_computes_the_loss_it_counts_once(loss):
    model = regularised(granularity="attn_token+mlp_token")
    LOSSES[loss](model).backward()
    same(gradients(model), by_hand("llama", "attn_token+mlp_token")[0], tolerance=1e-5)


def test_micro_batches_weigh_as_their_tokens_do_where_the_trainer_counts_them():
    model, halves = regularised(), (slice(0, 2), slice(2, 6))
    counts = [int((LABELS[rows, 1:] != -100).sum()) for rows in halves]
    for rows in halves:
        inputs = {"attention_mask": MASK[rows], "labels": LABELS[rows], "num_items_in_batch": sum(counts)}
        model(IDS[rows], **inputs).loss.backward()
    (first, *_), (second, *_) = (by_hand(rows=rows) for rows in halves)
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
    same(gradients(model), by_hand(scale=SCALE if last else 0.0)[0], tolerance=1e-5)


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
    assert capacity_penalty(model) is out.mod_penalty
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


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_a_plain_loop_takes_zero_routers_to_the_target(granularity):
    """On answers of the dense model, which are best where all runs: λ = 0 leaves the routers open."""
    ids, _ = random_batch(32, 12)
    labels, reached = dense_answers(tiny_model(), ids), {}
    for scale in (0.0, 1.0):
        model = route(tiny_model(), mod_layers=LAYERS, granularity=granularity, gradient_scale=scale)
        optimizer = torch.optim.Adam([p for p in freeze_base(model).parameters() if p.requires_grad], lr=0.02)
        for _ in range(45):
            with record_routing(model) as log:
                model(ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        reached[scale] = log.capacity()["total"]
    assert reached[1.0] == pytest.approx(0.5, abs=0.12) and reached[0.0] > 0.7, reached
