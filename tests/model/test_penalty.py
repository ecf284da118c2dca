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


def regularised(family="llama", granularity="attn_sequence", scale=SCALE, **options):
    options = {"gradient_scale": scale, "target_capacity": TARGET, **options}
    return freeze_base(routed_model(family, granularity, **options))


def by_hand(model, ids, mask):
    """Task loss and penalty, from logits and decisions alone, on a model that adds nothing itself."""
    with record_routing(model) as log:
        logits = model(ids, attention_mask=mask).logits
    return task_loss(logits, labels_of(ids, mask)), log.penalty(TARGET)


def expected(family="llama", granularity="attn_sequence", rows=slice(None), **options):
    """Gradients of ``task + λ·penalty`` by hand."""
    model = regularised(family, granularity, scale=0.0, **options)
    ids, mask = random_batch(6, padding="right")
    task, penalty = by_hand(model, ids[rows], mask[rows])
    (task + SCALE * penalty).backward()
    return gradients(model), task, penalty


def test_it_is_the_sum_over_layers_of_what_exceeds_the_target():
    model, (ids, mask) = routed_model("llama", "attn_token").train(), random_batch(padding="right")
    with record_routing(model) as log:
        model(ids, attention_mask=mask)
    shares = {layer: float(keep[mask.bool()].float().mean()) for layer, keep in log.decisions.items()}
    for target in (0.0, 0.3, 0.5, 1.0):
        assert log.penalty(target).item() == pytest.approx(sum(max(c - target, 0) for c in shares.values()), abs=1e-6)
    assert log.capacity() == pytest.approx({"total": sum(shares.values()) / 3, **shares})
    assert not any(value.requires_grad for value in log.capacity_tensors().values())


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "block_token", "mlp_sequence"])
@pytest.mark.parametrize("target", [0.1, 0.9])
def test_its_gradient_by_hand(granularity, target):
    """``∂/∂W ReLU(c − target)`` is the mean of ``s(1−s)·h`` over real rows or tokens, above the target."""
    model, features = routed_model("llama", granularity, mod_layers=[2]).train(), []
    ids, mask = random_batch(padding="right")
    [module] = routed_modules(model).values()
    module.mod_router.register_forward_pre_hook(lambda _, args: features.append(args[0].detach()))
    with record_routing(model) as log:
        model(ids, attention_mask=mask)
    log.penalty(target).backward()
    [h], router = features, module.mod_router.weight
    score = torch.sigmoid(h @ router.detach().T)
    slope = score * (1 - score) * h
    expected = slope.mean(0) if h.dim() == 2 else slope[mask.bool()].mean(0)
    assert (log.capacity()["total"] > target) == (target == 0.1)
    assert torch.allclose(router.grad[0], expected * (target == 0.1), atol=1e-6)


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "checkpointing"),
    [*[(*case, False) for case in CASES], *[(*case, True) for case in CASES[::3]]],
)
def test_a_forward_that_gets_labels_adds_it_and_gives_it(family, granularity, policy, checkpointing):
    ids, mask = random_batch(6, padding="right")
    theirs, task, penalty = expected(family, granularity, kv_policy=policy)
    model = regularised(family, granularity, kv_policy=policy)
    if checkpointing:
        model.gradient_checkpointing_enable()
    out = model(ids, attention_mask=mask, labels=labels_of(ids, mask))
    assert 0 < penalty and torch.allclose(out.mod_penalty, penalty)
    assert torch.allclose(out.loss, task + SCALE * penalty) and out["mod_penalty"] is out.mod_penalty
    out.loss.backward()
    same(gradients(model), theirs, tolerance=1e-5)


def task_loss(logits, labels):
    return cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


def fused(model, ids, mask, labels):
    """A head of one's own on the decoder, as trl's: no logits, and no loss of the model's."""
    hidden = model.base_model(ids, attention_mask=mask).last_hidden_state
    return task_loss(hidden @ model.lm_head.weight.T, labels)


def logits_alone(model, ids, mask, labels):
    return task_loss(model(ids, attention_mask=mask).logits, labels)


def ignored_loss(model, ids, mask, labels):
    """The model has put the term into a loss that nobody uses."""
    return task_loss(model(ids, attention_mask=mask, labels=labels).logits, labels)


def public(model, ids, mask, labels):
    return logits_alone(model, ids, mask, labels) + SCALE * capacity_penalty(model)


def in_a_tuple(model, ids, mask, labels):
    return model(ids, attention_mask=mask, labels=labels, return_dict=False)[0]


@pytest.mark.parametrize("loss", [fused, logits_alone, ignored_loss, public, in_a_tuple])
def test_whatever_computes_the_loss_it_counts_once(loss):
    ids, mask = random_batch(6, padding="right")
    model = regularised(granularity="attn_token+mlp_token")
    loss(model, ids, mask, labels_of(ids, mask)).backward()
    same(gradients(model), expected(granularity="attn_token+mlp_token")[0], tolerance=1e-5)


def test_micro_batches_weigh_as_their_tokens_do_where_the_trainer_counts_them():
    ids, mask = random_batch(6, padding="right")
    labels, model, halves = labels_of(ids, mask), regularised(), (slice(0, 2), slice(2, 6))
    counts = [int((labels[rows, 1:] != -100).sum()) for rows in halves]
    for rows in halves:
        out = model(ids[rows], attention_mask=mask[rows], labels=labels[rows], num_items_in_batch=sum(counts))
        out.loss.backward()
    parts, share = [expected(rows=rows)[0] for rows in halves], counts[0] / sum(counts)
    same(gradients(model), {n: share * parts[0][n] + (1 - share) * parts[1][n] for n in parts[0]}, tolerance=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_outside_a_loss_one_micro_batch_of_a_step_carries_it(last):
    """The last, as accelerate says: the others would multiply λ by their number."""
    ids, mask = random_batch(6, padding="right")
    model, plain = regularised(), regularised(scale=0.0)
    GradientState()._set_sync_gradients(last)
    try:
        logits_alone(model, ids, mask, labels_of(ids, mask)).backward()
    finally:
        GradientState()._set_sync_gradients(True)
    logits_alone(plain, ids, mask, labels_of(ids, mask)).backward()
    same(gradients(model), expected()[0] if last else gradients(plain), tolerance=1e-5)


def test_a_loss_that_is_scaled_for_float16_must_hold_the_term():
    ids, mask = random_batch(6, padding="right")
    model = regularised()
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16.*bfloat16"):
        logits_alone(model, ids, mask, labels_of(ids, mask)).backward()
    with torch.autocast("cpu", torch.float16):
        model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss.backward()


def test_without_a_scale_the_loss_is_the_familys():
    ids, mask = random_batch(6, padding="right")
    dense = tiny_model().train()(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss
    model = freeze_base(route(tiny_model(), mod_layers=LAYERS))
    assert torch.equal(model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss, dense)
    with torch.no_grad():
        assert "mod_penalty" not in model(ids, labels=ids)
        assert "mod_penalty" not in model.eval()(ids, labels=ids)


def test_no_graph_outlives_the_outputs_of_its_pass():
    model = regularised()
    ids, mask = random_batch(6, padding="right")
    kept = set(vars(routed_base(model)))
    out = model(ids, attention_mask=mask, labels=labels_of(ids, mask))
    assert capacity_penalty(model) is out.mod_penalty
    alive = weakref.ref(out.logits)
    loss = out.loss
    del out
    assert float(capacity_penalty(model).detach()) > 0  # alive with the loss
    gc.disable()
    try:
        del loss
        assert alive() is None and set(vars(routed_base(model))) == kept
    finally:
        gc.enable()
    with torch.no_grad():
        model.eval()(ids)
    with pytest.raises(ValueError, match="no forward pass of this model in training"):
        capacity_penalty(model)


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_a_plain_loop_takes_zero_routers_to_the_target(granularity):
    """On answers of the dense model, which are best where all runs: λ = 0 leaves the routers open."""
    ids, _ = random_batch(32, 12)
    labels = dense_answers(tiny_model(), ids)
    reached = {}
    for scale in (0.0, 1.0):
        model = route(tiny_model(), mod_layers=LAYERS, granularity=granularity, gradient_scale=scale)
        optimizer = torch.optim.Adam([p for p in freeze_base(model).parameters() if p.requires_grad], lr=0.02)
        with record_routing(model) as log:
            for step in range(45):
                if step == 30:
                    log.records.clear()
                optimizer.zero_grad()
                model(ids, labels=labels).loss.backward()
                optimizer.step()
        reached[scale] = log.capacity()["total"]
    assert reached[1.0] == pytest.approx(0.5, abs=0.12) and reached[0.0] > 0.7, reached
