"""The engine equals the masked dense model: every family, granularity, key policy, mode and way to split the work."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from tiny_models import FAMILIES, MOE, random_batch, tiny_model
from tiny_routed import KINDS, with_reference

from router_tuning.model import packed_attention, record_routing
from router_tuning.model.modules import decoder_of

TOLERANCE = 1e-4
DENSE = [*KINDS, ("attn_token+mlp_token", "keep"), ("attn_sequence+mlp_token", "keep")]
EXPERTS = [("expert_token", "keep"), ("attn_token+expert_token", "drop")]
# What a family's own modules decide: its projections, norms, windows and masks; of both policies and levels.
OF_A_FAMILY = [("attn_sequence", "keep"), ("attn_token", "keep"), ("block_token", "drop"), ("mlp_token", "keep")]
MATRIX = [
    *[(f, *case, "zero") for f in ("llama", "gemma3_text", "phi3", "mixtral") for case in DENSE],
    *[(f, *case, "zero") for f in FAMILIES for case in OF_A_FAMILY],
    *[(f, *case, "zero") for f in MOE for case in EXPERTS],
    *[("llama", *case, "low_rank") for case in DENSE],
    *[(f, "attn_sequence+mlp_token", "keep", "low_rank") for f in FAMILIES],
    ("mixtral", "attn_token+expert_token", "keep", "low_rank"),
    ("llama", "attn_token+mlp_sequence", "keep", "mean"),
]
MATRIX = list(dict.fromkeys(MATRIX))


def attention_of(family):
    """Scores of Gemma 2 are capped, which ``sdpa`` cannot."""
    return "eager" if family == "gemma2" else "sdpa"


@functools.cache
def pair(family, granularity, policy, skip, attn):
    return with_reference(family, granularity, policy, attn, skip=skip)


def close(actual, expected, real):
    """Largest difference over real tokens."""
    difference = (actual - expected).abs().amax(-1)[real.bool()].max().item()
    assert difference <= TOLERANCE, f"logits differ by {difference:.2e}"


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "skip", "attn"),
    [
        *[(*case, attention_of(case[0])) for case in MATRIX],
        *[(f, g, policy, "zero", "eager") for f in ("llama", "gemma3_text") for g, policy in DENSE if "mlp" not in g],
    ],
)
def test_equals_masked_dense_model(family, granularity, policy, skip, attn):
    model, reference = pair(family, granularity, policy, skip, attn)
    mixed = 0
    with torch.no_grad():
        for padding in (None, "left", "right"):
            ids, mask = random_batch(padding=padding)
            with record_routing(model) as log:
                whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            expected = reference.logits(ids, mask)
            close(whole, expected, mask)
            mixed += 0 < log.capacity()["total"] < 1
            model.train()  # no_grad holds: it skips
            close(model(input_ids=ids, attention_mask=mask).logits, expected, mask)
            with torch.enable_grad():  # now every module runs
                close(model(input_ids=ids, attention_mask=mask).logits.detach(), expected, mask)
            model.eval()
            if padding != "right":
                check_cached(model, reference, ids, mask, sequence="sequence" in granularity)
        ids, mask = random_batch(rows=1)
        close(model(input_ids=ids, use_cache=False).logits, reference.logits(ids), mask)
        check_cached(model, reference, ids, mask, sequence="sequence" in granularity)
    assert mixed, "the routers must split these inputs, or nothing is tested"


PACKED = pytest.mark.parametrize(
    ("family", "granularity", "skip"),
    [
        *[
            ("llama", g, s)
            for g in ("attn_token", "block_token", "attn_token+mlp_token")
            for s in ("zero", "low_rank")
        ],
        *[(f, "attn_token", "zero") for f in FAMILIES if f != "llama"],
    ],
)


@PACKED
def test_queries_spread_as_on_a_gpu_equal_the_masked_dense_model(family, granularity, skip, monkeypatch):
    monkeypatch.setattr(packed_attention.SpreadQueries, "pays", lambda *_: True)
    test_equals_masked_dense_model(family, granularity, "keep", skip, attention_of(family))


@PACKED
def test_queries_in_chunks_equal_the_masked_dense_model(family, granularity, skip, monkeypatch):
    chunked, plain = [], packed_attention._in_chunks

    def in_chunks(*args, attn_mask, **kwargs):
        chunked.append(attn_mask.behind)
        return plain(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(packed_attention, "_WORTH", 4)
    monkeypatch.setattr(packed_attention, "_LEAST", 2)
    monkeypatch.setattr(packed_attention, "_in_chunks", in_chunks)
    test_equals_masked_dense_model(family, granularity, "keep", skip, attention_of(family))
    assert family == "gemma2" or max(map(len, chunked)) > 2


def _prefix(kind):
    """A 4-D mask under which the first half sees itself both ways."""
    seen = torch.ones(12, 12).tril().bool()
    seen[:6, :6] = True
    seen = seen[None, None].expand(3, -1, -1, -1)
    return seen if kind is bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


SEEN = [
    ("gemma3_text", "sdpa", "both ways by config"),
    ("llama", "sdpa", "prefix"),
    ("llama", "sdpa", "additive prefix"),
    ("llama", "eager", "additive prefix"),
    ("llama", "sdpa", "both ways by keyword"),
    ("llama", "sdpa", "both ways by switch"),
    ("llama", "eager", "both ways by switch"),
]


@pytest.mark.parametrize("how", ["at once", "in chunks", "spread"])
@pytest.mark.parametrize("policy", ["keep", "drop"])
@pytest.mark.parametrize(
    ("family", "attn", "seen", "granularity"),
    [*[(*case, "attn_token") for case in SEEN], (*SEEN[0], "block_token"), (*SEEN[4], "block_token")],
)
def test_attention_need_not_be_causal(family, attn, seen, granularity, policy, how, monkeypatch):
    """What a query sees is what mask, keyword and module say, in evaluation, however it is run, and in training."""
    monkeypatch.setattr(packed_attention.SpreadQueries, "pays", lambda *_: how == "spread")
    if how == "in chunks":
        monkeypatch.setattr(packed_attention, "_WORTH", 4)
        monkeypatch.setattr(packed_attention, "_LEAST", 2)
    dense = tiny_model(family, attn, **({"use_bidirectional_attention": True} if "config" in seen else {}))
    model, reference = with_reference(granularity=granularity, policy=policy, model=dense)
    for switched in (model, reference.model) if "switch" in seen else ():
        switched.config.is_causal = False
        for layer in decoder_of(switched).layers:
            layer.self_attn.is_causal = False
    ids, padded = random_batch(padding="left")
    inputs = {"is_causal": False} if "keyword" in seen else {}
    masks = [_prefix(float if "additive" in seen else bool)] if "prefix" in seen else [None, padded][: 2 - len(inputs)]
    for mask in masks:
        real = mask if mask is padded else torch.ones_like(ids)
        expected = reference.logits(ids, mask, **inputs)
        with record_routing(model) as log, torch.no_grad():
            close(model(ids, attention_mask=mask, use_cache=False, **inputs).logits, expected, real)
        assert 0 < log.capacity()["total"] < 1
        close(model.train()(ids, attention_mask=mask, **inputs).logits, expected, real)
        model.eval()


def check_cached(model, reference, ids, mask, sequence):
    """Chunks and single steps through a cache equal one recomputation, under the decisions of the cache.

    The first chunk may hold nothing of a row but padding: what begins it, and decides on it, then comes later.
    """
    cuts = [0, 3, 6, 9, 10, 11, 12]
    cache, reference.held = None, {}
    for start, end in itertools.pairwise(cuts):
        out = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        expected = reference.logits(ids[:, :end], mask[:, :end], hold=sequence and start > 0)
        close(out.logits, expected[:, start:], mask[:, start:end])
    assert cache.get_seq_length() == ids.shape[1]
