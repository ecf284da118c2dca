"""record_routing and force_routing: what is logged, what may be imposed, and what is refused."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from refused import refused
from tiny_models import random_batch, tiny_model
from tiny_routed import LAYERS, routed_model

from router_tuning.model import force_routing, record_routing, route

ROWS, TOKENS = 3, 12


def forward(model, **kwargs):
    with torch.no_grad():
        return model(random_batch(ROWS, TOKENS)[0], **kwargs)


# ---------------------------------------------------------------- recording


@pytest.mark.parametrize(
    ("granularity", "keys", "shape"),
    [
        ("attn_sequence", LAYERS, (ROWS,)),
        ("mlp_token", LAYERS, (ROWS, TOKENS)),
        ("attn_token+mlp_token", [(n, part) for n in LAYERS for part in ("attn", "mlp")], (ROWS, TOKENS)),
        ("expert_token", LAYERS, (ROWS * TOKENS, 2)),  # per assignment
    ],
)
def test_keys_shapes_and_types(granularity, keys, shape):
    model = routed_model("mixtral", granularity)
    plain = forward(model).logits
    with record_routing(model) as log:
        assert torch.equal(forward(model).logits, plain), "recording changes nothing"
    assert list(log.decisions) == keys and set(log.capacity()) == {"total", *keys}
    for key in keys:
        assert log.decisions[key].shape == log.scores[key].shape == shape
        assert log.decisions[key].dtype == torch.bool and log.scores[key].dtype == torch.float32
        assert torch.equal(log.scores[key] >= 0.5, log.decisions[key])
    assert log.capacity()["total"] == pytest.approx(sum(log.capacity()[key] for key in keys) / len(keys))


def test_blocks_nest_and_end_also_by_an_error():
    model = routed_model()
    with record_routing(model) as outer:
        forward(model)
        with record_routing(model) as inner:
            forward(model)
        forward(model)
    forward(model)
    assert [len(log.records[1]) for log in (outer, inner)] == [3, 1]
    with pytest.raises(RuntimeError), record_routing(model):
        raise RuntimeError
    assert not model.model.mod_logs


def test_capacity_of_several_passes_is_weighted_by_their_size():
    model = route(tiny_model(), mod_layers=LAYERS, granularity="attn_token")
    with record_routing(model) as log, torch.no_grad():
        for rows, keep in ((3, True), (1, False)):
            with force_routing(model, keep):
                model(random_batch(rows, 10)[0])
    assert log.capacity() == {"total": 0.75, 1: 0.75, 2: 0.75, 3: 0.75}


@pytest.mark.parametrize(("granularity", "shape"), [("attn_sequence", (2,)), ("attn_token", (2, 7 + 4))])
def test_generation_is_logged_whole(granularity, shape):
    model = routed_model("llama", granularity)
    ids, _ = random_batch(2, 7)
    with record_routing(model) as log:
        model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert log.decisions[1].shape == shape
    passes = 1 if granularity == "attn_sequence" else 5
    assert all(len(records) == passes for records in log.records.values()), "a held decision is logged once"


# ---------------------------------------------------------------- forcing


def test_blocks_hold_until_their_end_and_may_end_in_any_order():
    model, first, second = routed_model("llama", "attn_token"), ExitStack(), ExitStack()

    def share():
        with record_routing(model) as log:
            forward(model)
        return log.capacity()["total"], log.scores == {}

    own, logits = share(), forward(model).logits
    assert 0.0 < own[0] < 1.0 and not own[1]
    first.enter_context(force_routing(model, True))
    assert share() == (1.0, True)
    second.enter_context(force_routing(model, False))  # of another thread
    assert share() == (0.0, True)
    first.close()
    assert share() == (0.0, True)
    first.enter_context(force_routing(model, True))
    assert share() == (1.0, True)
    first.close()
    assert share() == (0.0, True), "the outer block holds again"
    second.close()
    assert share() == own and torch.equal(forward(model).logits, logits)


def test_routers_that_are_not_named_decide_for_themselves():
    model, rows = routed_model("llama", "attn_token+mlp_sequence"), torch.tensor([True, False, True])
    with record_routing(model) as own:
        forward(model)
    imposed = {(1, "attn"): own.decisions[1, "attn"], (1, "mlp"): rows, 2: False}
    with force_routing(model, imposed), record_routing(model) as log:
        forward(model)
    assert torch.equal(log.decisions[1, "attn"], own.decisions[1, "attn"])
    assert torch.equal(log.decisions[1, "mlp"], rows)
    assert not log.decisions[2, "mlp"].any() and not log.decisions[2, "attn"].any()
    assert set(log.scores) == {(3, "attn"), (3, "mlp")} and 0 < log.decisions[3, "attn"].float().mean() < 1


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token"])
@pytest.mark.parametrize(
    ("keep", "rows"),
    [
        (torch.tensor(False), [0, 0, 0]),
        (np.bool_(True), [1, 1, 1]),
        ({1: np.False_, 2: torch.tensor(False), 3: False}, [0, 0, 0]),
        (torch.tensor([True, False, True]), [1, 0, 1]),  # at token level, spread over the tokens
        ([True, False, False], [1, 0, 0]),
    ],
)
def test_masks_of_any_kind_serve_all_layers(keep, rows, granularity):
    model = routed_model("llama", granularity)
    with force_routing(model, keep), record_routing(model) as log:
        forward(model)
    for decision in log.decisions.values():
        assert [set(row) for row in decision.view(ROWS, -1).tolist()] == [{bool(run)} for run in rows]


def test_a_callable_is_asked_for_every_decision():
    model, asked = routed_model("llama", "attn_token+mlp_sequence"), []

    def half(layer, part, shape, past):
        asked.append((layer, part, tuple(shape), past))
        return torch.arange(shape.numel()).view(shape) % 2 == 0 if layer == 1 else None

    with force_routing(model, half), record_routing(model) as log:
        forward(model)
    shapes = {"attn": (ROWS, TOKENS), "mlp": (ROWS,)}
    assert asked == [(layer, part, shapes[part], 0) for layer in LAYERS for part in ("attn", "mlp")]
    assert log.decisions[1, "mlp"].tolist() == [True, False, True] and (2, "mlp") in log.scores


def test_one_mask_serves_a_whole_generation():
    model = routed_model("llama", "attn_token", kv_policy="drop")
    ids, _ = random_batch(2, 6)
    mask = torch.rand(2, 6 + 5, generator=torch.Generator().manual_seed(2)) < 0.5
    with force_routing(model, mask), record_routing(model) as log:
        out = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        for decision in log.decisions.values():
            assert torch.equal(decision, mask)
        with torch.no_grad():
            whole = model(out[:, :-1], use_cache=False).logits[:, 5:].argmax(-1)
    assert torch.equal(whole, out[:, 6:])
    with refused("forced mask"), force_routing(model, mask[:, :8]):
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def test_padding_is_never_kept_and_is_no_capacity():
    ids, mask = random_batch(padding="left")
    zero, forced = route(tiny_model(), mod_n=3, granularity="attn_token"), routed_model("llama", "attn_token")
    for model, keep in ((zero, {}), (forced, True)):
        with force_routing(model, keep), record_routing(model) as log, torch.no_grad():
            model(ids, attention_mask=mask)
        assert torch.equal(log.decisions[1], mask.bool()) and log.capacity()["total"] == 1.0


@pytest.mark.parametrize(
    ("granularity", "keep"),
    [
        ("attn_sequence", torch.ones(2, dtype=torch.bool)),
        ("attn_sequence", torch.ones(ROWS, TOKENS, dtype=torch.bool)),
        ("attn_sequence", torch.ones(ROWS)),
        ("attn_sequence", torch.ones(ROWS, dtype=torch.long)),
        ("attn_sequence", [0, 1, 1]),
        ("attn_sequence", 1),
        ("attn_sequence", 0.5),
        ("attn_sequence", "all"),
        ("attn_token", torch.ones(ROWS, TOKENS - 1, dtype=torch.bool)),
        ("attn_token", torch.ones(2, TOKENS, dtype=torch.bool)),
        ("attn_token", torch.ones(ROWS, TOKENS, 1, dtype=torch.bool)),
        ("attn_token", torch.ones(2, dtype=torch.bool)),
        ("attn_token", lambda layer, part, shape, past: torch.ones(1, 1, dtype=torch.bool)),
        ("attn_token", lambda layer, part, shape, past: 0.7),
        *[("attn_sequence", keep) for keep in ({0: True}, {(1, "mlp"): True}, {"1": True}, {1: True, 9: False})],
    ],
)
def test_masks_of_another_shape_type_or_name_are_refused(granularity, keep):
    model = routed_model("llama", granularity)
    own = forward(model).logits
    words = "forced mask names no router" if isinstance(keep, dict) else "forced mask of layer 1"
    with refused(words), force_routing(model, keep):
        forward(model)
    assert torch.equal(forward(model).logits, own), "nothing stays behind"
