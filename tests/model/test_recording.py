"""record_routing and force_routing: what is logged, what may be imposed, and what is refused."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from refused import refused
from tiny_models import random_batch, tiny_model
from tiny_routed import LAYERS, routed_model

from router_tuning.model import force_routing, record_routing, route

ROWS, TOKENS = 3, 12
TWO = "attn_token+mlp_sequence"
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@torch.no_grad()
def forward(model):
    return model(random_batch(ROWS, TOKENS)[0]).logits


def logged(model):
    with record_routing(model) as log:
        forward(model)
    return log


# ---------------------------------------------------------------- recording


@pytest.mark.parametrize(
    ("granularity", "keys", "shape"),
    [
        ("attn_sequence", LAYERS, (ROWS,)),
        ("attn_token+mlp_token", [(n, part) for n in LAYERS for part in ("attn", "mlp")], (ROWS, TOKENS)),
        ("expert_token", LAYERS, (ROWS * TOKENS, 2)),  # per assignment
    ],
)
def test_every_router_leaves_its_decisions_and_scores(granularity, keys, shape):
    model = routed_model("mixtral", granularity)
    plain = forward(model)
    with record_routing(model) as log:
        assert torch.equal(forward(model), plain), "recording changes nothing"
    assert list(log.decisions) == list(log.scores) == keys and set(log.capacity()) == {"total", *keys}
    for keep, score in zip(log.decisions.values(), log.scores.values(), strict=True):
        assert keep.shape == score.shape == shape and keep.dtype == torch.bool and score.dtype == torch.float32
        assert torch.equal(score >= 0.5, keep)


def test_blocks_nest_and_end_also_by_an_error():
    model = routed_model()
    with record_routing(model) as outer:
        forward(model)
        inner = logged(model)
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


def test_padding_is_never_kept_and_is_no_capacity():
    ids, mask = random_batch(padding="left")
    zero, forced = route(tiny_model(), mod_n=3, granularity="attn_token"), routed_model("llama", "attn_token")
    for model, keep in ((zero, {}), (forced, True)):
        with force_routing(model, keep), record_routing(model) as log, torch.no_grad():
            model(ids, attention_mask=mask)
        assert torch.equal(log.decisions[1], mask.bool()) and log.capacity()["total"] == 1.0


def test_generation_is_logged_whole_and_a_held_decision_once():
    model = routed_model("llama", TWO)
    with record_routing(model) as log:
        model.generate(random_batch(2, 7)[0], **GREEDY)
    for (_, part), records in log.records.items():
        assert len(records) == (5 if part == "attn" else 1)
    assert log.decisions[1, "attn"].shape == (2, 7 + 4) and log.decisions[1, "mlp"].shape == (2,)


# ---------------------------------------------------------------- forcing


def test_forcing_holds_until_its_block_ends_whichever_ends_first():
    model, first, second = routed_model("llama", "attn_token"), ExitStack(), ExitStack()

    def share():
        log = logged(model)
        assert (log.scores == {}) == (log.capacity()["total"] in (0, 1)), "a router that is not asked has no score"
        return log.capacity()["total"]

    own, logits = share(), forward(model)
    assert 0 < own < 1
    first.enter_context(force_routing(model, True))
    assert share() == 1
    second.enter_context(force_routing(model, False))  # of another thread
    assert share() == 0
    first.close()
    assert share() == 0
    first.enter_context(force_routing(model, True))
    assert share() == 1
    first.close()
    assert share() == 0, "the outer block holds again"
    second.close()
    assert share() == own and torch.equal(forward(model), logits)


@pytest.mark.parametrize("how", ["by name", "by a callable"])
def test_routers_for_which_nothing_is_said_decide_for_themselves(how):
    model, rows, asked = routed_model("llama", TWO), torch.tensor([True, False, True]), []
    own = logged(model).decisions
    imposed = {(1, "attn"): own[1, "attn"], (1, "mlp"): rows, 2: False}

    def said(layer, part, shape, past):
        asked.append((layer, part, tuple(shape), past))
        return imposed.get((layer, part), imposed.get(layer))

    with force_routing(model, imposed if how == "by name" else said):
        log = logged(model)
    assert torch.equal(log.decisions[1, "attn"], own[1, "attn"]) and torch.equal(log.decisions[1, "mlp"], rows)
    assert not log.decisions[2, "mlp"].any() and not log.decisions[2, "attn"].any()
    assert set(log.scores) == {(3, "attn"), (3, "mlp")} and 0 < log.decisions[3, "attn"].float().mean() < 1
    shapes = {"attn": (ROWS, TOKENS), "mlp": (ROWS,)}
    every = [(layer, part, shapes[part], 0) for layer in LAYERS for part in shapes]
    assert asked == (every if how == "by a callable" else [])


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token"])
@pytest.mark.parametrize(
    ("keep", "rows"),
    [
        (np.bool_(True), [1, 1, 1]),
        ({1: np.False_, 2: torch.tensor(False), 3: False}, [0, 0, 0]),
        (torch.tensor([True, False, True]), [1, 0, 1]),  # at token level, spread over the tokens
        ([True, False, False], [1, 0, 0]),
    ],
)
def test_masks_of_any_kind_serve_all_layers(keep, rows, granularity):
    model = routed_model("llama", granularity)
    with force_routing(model, keep):
        for decision in logged(model).decisions.values():
            assert [set(row) for row in decision.view(ROWS, -1).tolist()] == [{bool(run)} for run in rows]


def test_one_mask_serves_a_whole_generation():
    model, ids = routed_model("llama", "attn_token", kv_policy="drop"), random_batch(2, 6)[0]
    mask = torch.rand(2, 6 + 4, generator=torch.Generator().manual_seed(2)) < 0.5
    with force_routing(model, mask), record_routing(model) as log, torch.no_grad():
        out = model.generate(ids, **GREEDY)
        assert all(torch.equal(decision, mask) for decision in log.decisions.values())
        whole = model(out[:, :-1], use_cache=False).logits[:, 5:].argmax(-1)
    assert torch.equal(whole, out[:, 6:])
    with refused("forced mask"), force_routing(model, mask[:, :8]):
        model.generate(ids, **GREEDY)


OF_NO_ROUTER = [{0: True}, {(1, "mlp"): True}, {"1": True}, {1: True, 9: False}]
OF_NO_ROWS = [torch.ones(2).bool(), torch.ones(ROWS, TOKENS).bool(), torch.ones(ROWS), torch.ones(ROWS).long()]
OF_NO_TOKENS = [torch.ones(shape).bool() for shape in ((ROWS, TOKENS - 1), (2, TOKENS), (ROWS, TOKENS, 1), (2,))]
OF_NO_TOKENS += [lambda layer, part, shape, past: torch.ones(1, 1).bool(), lambda layer, part, shape, past: 0.7]


@pytest.mark.parametrize(
    ("granularity", "keep", "words"),
    [
        *[("attn_sequence", keep, "names no router") for keep in OF_NO_ROUTER],
        *[("attn_sequence", keep, "of layer 1") for keep in (*OF_NO_ROWS, [0, 1, 1], 1, 0.5, "all")],
        *[("attn_token", keep, "of layer 1") for keep in OF_NO_TOKENS],
    ],
)
def test_masks_of_another_shape_type_or_name_are_refused(granularity, keep, words):
    model = routed_model("llama", granularity)
    own = forward(model)
    with refused(f"forced mask {words}"), force_routing(model, keep):
        forward(model)
    assert torch.equal(forward(model), own), "nothing stays behind"
