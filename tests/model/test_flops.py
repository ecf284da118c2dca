"""Floating-point operations under forced masks against pencil and paper, counted by torch.

Counted are matrix products, two operations per multiply-add. Attention is counted without the saving of causality:
every query that runs against every key that its row offers (under ``keep`` those of all tokens, under ``drop`` those
of the kept ones), which is what a dense kernel under a mask computes.
"""

from contextlib import nullcontext

import pytest
import torch
from counted_operations import counted
from tiny_models import random_batch, tiny_model
from tiny_routed import KINDS, LAYERS

from router_tuning.model import force_routing, record_routing, route
from router_tuning.model.flops import decoder_flops, flops_share, saved_shares

ROWS, TOKENS, DEPTH, VOCAB = 4, 32, 5, 61
HIDDEN, INNER, HEADS, KV_HEADS, WIDTH = 32, 48, 4, 2, 8
Q = OUT = 2 * HIDDEN * HEADS * WIDTH  # per token
KV = 2 * 2 * HIDDEN * KV_HEADS * WIDTH
MLP = 3 * 2 * HIDDEN * INNER
PAIR = 2 * 2 * HEADS * WIDTH  # per query and key: scores and weighted sum
HEAD = 2 * HIDDEN * VOCAB
ATTEND = Q + KV + OUT + (TOKENS + 1) * PAIR  # of a decoding step


IDS, _ = random_batch(ROWS, TOKENS)


def expected_layer(granularity, policy, share, use_cache=True):
    """One routed layer in which ``share`` of the rows, or of every row's tokens, run."""
    part, level = granularity.split("_")
    if level == "token" and share == 0 and not use_cache:
        policy = "drop"  # nobody will ever read the keys
    everything, executed = ROWS * TOKENS, share * ROWS * TOKENS
    attends, runs_mlp = (everything if part == "mlp" else executed), (everything if part == "attn" else executed)
    keys, offered = TOKENS, attends
    if level == "token" and part != "mlp":
        keys, offered = (TOKENS, everything) if policy == "keep" else (share * TOKENS, executed)
    return attends * (Q + OUT + keys * PAIR) + offered * KV + runs_mlp * MLP


def masks(granularity, share):
    """``share`` of the rows, or of the tokens of each row, here and there."""
    shape, generator = [ROWS] if "sequence" in granularity else [ROWS, TOKENS], torch.Generator().manual_seed(3)
    order = torch.rand(len(LAYERS), *shape, generator=generator).argsort(-1)
    return dict(zip(LAYERS, order < share * shape[-1], strict=True))


@pytest.mark.parametrize(("share", "use_cache"), [(0.0, False), (0.0, True), (0.25, True), (1.0, False)])
@pytest.mark.parametrize(("granularity", "policy"), KINDS)
def test_operations_of_a_forward_pass(granularity, policy, share, use_cache):
    model = route(tiny_model(), mod_layers=LAYERS, granularity=granularity, kv_policy=policy)
    with force_routing(model, masks(granularity, share)):
        measured = counted(model, input_ids=IDS, use_cache=use_cache)
    dense = ROWS * TOKENS * (Q + KV + OUT + MLP + TOKENS * PAIR)
    expected = ROWS * TOKENS * HEAD + (DEPTH - len(LAYERS)) * dense
    expected += len(LAYERS) * expected_layer(granularity, policy, share, use_cache)
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_experts_run_for_the_assignments_that_are_kept(share):
    model, assignments = tiny_model("mixtral"), 2 * ROWS * TOKENS
    model.config._experts_implementation = "eager"
    everything = counted(model, input_ids=IDS)
    route(model, mod_layers=LAYERS, granularity="expert_token")
    order = torch.randperm(assignments, generator=torch.Generator().manual_seed(1)).view(-1, 2)
    with force_routing(model, dict.fromkeys(LAYERS, order < share * assignments)):
        saved = everything - counted(model, input_ids=IDS)
    assert saved == pytest.approx(len(LAYERS) * (1 - share) * assignments * MLP, rel=0.01, abs=1)


@pytest.mark.parametrize(
    ("granularity", "policy", "saved"),
    [
        *[("attn_sequence", "keep", ATTEND), ("attn_token", "keep", ATTEND - KV), ("attn_token", "drop", ATTEND)],
        *[("mlp_token", "keep", MLP), ("mlp_sequence", "keep", MLP)],
        *[("block_sequence", "keep", ATTEND + MLP), ("block_token", "drop", ATTEND + MLP)],
    ],
)
@torch.no_grad()
def test_operations_of_a_decoding_step(granularity, policy, saved):
    """A step whose token is skipped costs what it must: under ``keep`` its key and value, no read of the cache."""
    dense, model = tiny_model(), route(tiny_model(), mod_layers=LAYERS, granularity=granularity, kv_policy=policy)

    def step(one, keep=None):
        prefill = keep or "sequence" not in granularity  # the prompt of a row that is skipped is skipped as well
        with nullcontext() if keep is None else force_routing(one, prefill):
            cache = one(IDS).past_key_values
        with nullcontext() if keep is None else force_routing(one, keep):
            return counted(one, input_ids=IDS[:, :1], past_key_values=cache)

    assert step(model, True) == step(dense)
    assert step(dense) - step(model, False) == pytest.approx(len(LAYERS) * ROWS * saved, rel=0.01)


# ---------------------------------------------------------------- what a budget leaves, on paper


@pytest.mark.parametrize(
    ("family", "granularity", "skip"),
    [
        *[("llama", g, s) for g, policy in KINDS if policy == "keep" for s in ("zero", "low_rank")],
        *[(f, g, "zero") for f in ("phi3", "mixtral", "qwen2_moe") for g in ("attn_token", "mlp_token")],
    ],
)
def test_the_share_on_paper_is_that_of_a_real_pass(family, granularity, skip):
    """A real pass gives every query all keys, as many as 2·t - 1 tokens do on average, and fills up short rows."""
    dense = tiny_model(family)
    dense.config._experts_implementation = "eager"
    everything = counted(dense, input_ids=IDS) - ROWS * TOKENS * HEAD
    model = route(dense, mod_layers=LAYERS, granularity=granularity, skip=skip, skip_rank=4)
    assert decoder_flops(model, 2 * TOKENS - 1) * ROWS * TOKENS == pytest.approx(everything, rel=0.01)
    with record_routing(model) as log, force_routing(model, masks(granularity, 0.5)):
        left = counted(model, input_ids=IDS) - ROWS * TOKENS * HEAD
    share = {f"{layer}.{granularity.split('_')[0]}": float(c) for layer, c in log.capacity_tensors().items()}
    assert flops_share(model, share, 2 * TOKENS - 1) == pytest.approx(left / everything, abs=0.01)


def test_windows_bound_the_keys():
    model = route(tiny_model("mistral", sliding_window=6), mod_layers=LAYERS, granularity="attn_sequence")
    keys = sum(min(n, 6) for n in range(1, 33)) / 32
    assert saved_shares(model, 32)["1.attn"] * decoder_flops(model, 32) == pytest.approx(Q + KV + OUT + keys * PAIR)


def test_parts_weigh_what_they_cost():
    model = route(tiny_model(), mod_layers={"attn": [1], "mlp": [2, 3]}, granularity="attn_token+mlp_token")
    total = decoder_flops(model, 1)
    assert total == DEPTH * (Q + KV + OUT + MLP + PAIR)
    assert flops_share(model, 0.5, 1) == pytest.approx(1 - 0.5 * (Q + OUT + PAIR + 2 * MLP) / total)
