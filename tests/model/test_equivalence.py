"""The engine equals the masked dense model: every family, granularity, key policy, mode and way to split the work."""

import functools

import pytest
import torch
from masked_reference import check, close
from tiny_models import FAMILIES, MOE, random_batch, tiny_model
from tiny_routed import DENSE, KINDS, with_reference

from router_tuning.model import force_routing, packed_attention, record_routing, routed
from router_tuning.model.modules import decoder_of

ATTEND = [case for case in KINDS if "mlp" not in case[0]]
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
PACKED = [
    *[("llama", g, "keep", "low_rank") for g in ("attn_token", "block_token", "attn_token+mlp_token")],
    *[("llama", g, "keep", "zero") for g in ("block_token", "attn_token+mlp_token")],
    *[(f, "attn_token", "keep", "zero") for f in FAMILIES],
]


pair = functools.cache(with_reference)


def best(family):
    """The implementation of its attention: scores of Gemma 2 are capped, which ``sdpa`` cannot."""
    return "eager" if family == "gemma2" else "sdpa"


@pytest.fixture
def queries(monkeypatch):
    """``queries(how)``: kept queries run at once, in chunks as where they are many, or spread as on a GPU.

    At once a decoding step of few sequences runs for all of them or for none; otherwise for the kept ones, as of many.
    """
    plain = packed_attention._in_chunks

    def run(how):
        chunks = []

        def in_chunks(*args, attn_mask, **kwargs):
            chunks.append(len(attn_mask.behind))
            return plain(*args, attn_mask=attn_mask, **kwargs)

        monkeypatch.setattr(routed, "_FEW", 32 if how == "at once" else 0)
        monkeypatch.setattr(packed_attention.SpreadQueries, "pays", lambda *_: how == "spread")
        monkeypatch.setattr(packed_attention, "_in_chunks", in_chunks)
        if how == "in chunks":
            monkeypatch.setattr(packed_attention, "_WORTH", 4)
            monkeypatch.setattr(packed_attention, "_LEAST", 2)
        return chunks

    return run


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "skip", "attn", "how"),
    [
        *[(*case, best(case[0]), "at once") for case in MATRIX],
        *[(f, *case, "zero", "eager", "at once") for f in ("llama", "gemma3_text") for case in ATTEND],
        *[(*case, best(case[0]), how) for case in PACKED for how in ("spread", "in chunks")],
        *[("llama", *case, "zero", "sdpa", "many") for case in DENSE if "token" in case[0]],
    ],
)
def test_equals_masked_dense_model(family, granularity, policy, skip, attn, how, queries):
    chunks = queries(how)
    model, reference = pair(family, granularity, policy, attn, skip=skip)
    check(model, reference)
    assert how != "in chunks" or family == "gemma2" or max(chunks) > 2
    for padding in ("right", "left"):
        ids, mask = random_batch(padding=padding)
        expected = reference.logits(ids, mask)
        for gradients in (False, True):  # without them it skips, with them every module runs
            with torch.set_grad_enabled(gradients):
                close(model.train()(ids, attention_mask=mask).logits.detach(), expected, mask)
    model.eval()
    for all_run in (True, False):
        reference.threshold = 0.0 if all_run else 2.0
        with force_routing(model, all_run), torch.no_grad():
            close(model(ids, attention_mask=mask).logits, reference.logits(ids, mask), mask)
    reference.threshold = 0.5


def _prefix(kind):
    """A 4-D mask under which the first half sees itself both ways."""
    seen = torch.ones(12, 12).tril().bool()
    seen[:6, :6] = True
    seen = seen[None, None].expand(3, -1, -1, -1)
    return seen if kind is bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


SEEN = [
    ("gemma3_text", "sdpa", "both ways by config"),
    *[("llama", "sdpa", how) for how in ("both ways by keyword", "prefix")],
    *[("llama", attn, how) for attn in ("sdpa", "eager") for how in ("additive prefix", "both ways by switch")],
]


@pytest.mark.parametrize("how", ["at once", "in chunks", "spread"])
@pytest.mark.parametrize("policy", ["keep", "drop"])
@pytest.mark.parametrize(
    ("family", "attn", "seen", "granularity"),
    [*[(*case, "attn_token") for case in SEEN], *[(*case, "block_token") for case in SEEN[:2]]],
)
def test_attention_need_not_be_causal(family, attn, seen, granularity, policy, how, queries):
    """What a query sees is what mask, keyword and module say, in evaluation, however it is run, and in training."""
    queries(how)
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
