"""Half-precision weights, autocast and attention implementations: as close to float32 as the dense model is."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from refused import refused
from tiny_models import random_batch, tiny_model
from tiny_routed import CASES, LAYERS, routed_model
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM
from transformers.integrations import flex_attention as integration

from router_tuning.model import force_routing, packing, record_routing, route, routed_modules


def masks(rows, tokens):
    """Decisions of every router for this batch, imposed so that two dtypes compute the same thing.

    Both experts of a token share one: which of them comes first is a matter of rounding.
    """
    generator, drawn = torch.Generator().manual_seed(11), {}

    def draw(layer, part, shape, past):
        keys = (rows,) if part != "expert" and len(shape) == 1 else (rows, tokens)
        if (layer, part) not in drawn:
            drawn[layer, part] = torch.rand(keys, generator=generator) < 0.6
        mask = drawn[layer, part]
        if part == "expert":
            return mask[:, past : past + shape[0] // rows].flatten()[:, None].expand(shape)
        return mask if len(shape) == 1 else mask[:, past : past + shape[1]]

    return draw


def run(model, ids, mask, way="whole"):
    """Logits of one pass, of several through a cache, or of one in training."""
    with torch.set_grad_enabled(way == "training"):
        if way != "cached":
            logits = model.train(way == "training")(ids, attention_mask=mask, use_cache=False).logits
            model.eval()
            return logits.float().detach()
        parts, cache = [], None
        for start, end in ((0, 8), (8, 11), (11, 12)):
            out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            parts.append(out.logits.float())
            cache = out.past_key_values
        return torch.cat(parts, 1)


def deviation(family, one, other, mask):
    """Largest difference of a token's logits: the worst token's, or the median token's of a mixture of experts.

    Where two experts are nearly tied, rounding chooses another one, and that token is simply elsewhere.
    """
    tokens = (one - other)[mask.bool()].abs().amax(-1)
    return (tokens.median() if family == "mixtral" else tokens.max()).item()


def rounded(model, dtype):
    """A copy of a float32 model in ``dtype``, and the block in which it runs."""
    auto = dtype == "autocast"
    return copy.deepcopy(model).to(torch.float32 if auto else dtype), torch.autocast(
        "cpu", torch.bfloat16, enabled=auto
    )


@functools.cache
def dense_error(family, dtype):
    """How far the dense model in this dtype is from float32: the yardstick."""
    model, (ids, mask) = tiny_model(family), random_batch(padding="left")
    half, block = rounded(model, dtype)
    with block:
        found = run(half, ids, mask)
    return deviation(family, run(model, ids, mask), found, mask)


@pytest.mark.parametrize(
    ("attn", "dtype"),
    [("sdpa", torch.bfloat16), ("eager", torch.bfloat16), ("sdpa", torch.float16), ("sdpa", "autocast")],
)
@pytest.mark.parametrize(("family", "granularity", "policy"), CASES)
def test_it_deviates_as_the_dense_model_does(family, granularity, policy, attn, dtype):
    ids, mask = random_batch(padding="left")
    exact = routed_model(family, granularity, attn, kv_policy=policy)
    half, block = rounded(exact, dtype)
    for way in ("whole", "cached", "training"):
        with force_routing(exact, masks(*ids.shape)):
            expected = run(exact, ids, mask, way)
        with force_routing(half, masks(*ids.shape)), block:
            actual = run(half, ids, mask, way)
        assert 0 < deviation(family, expected, actual, mask) <= 3 * dense_error(family, dtype), way
    with record_routing(half) as log, block:
        own = run(half, ids, mask)
        out = half.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        half.train()(ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100)).loss.backward()
    assert torch.isfinite(own[mask.bool()]).all() and out.shape[1] == 16
    assert 0 < log.capacity()["total"] < 1
    assert all(record.logits.dtype == torch.float32 for records in log.records.values() for record in records)
    for module in routed_modules(half).values():
        gradient = module.mod_router.weight.grad
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_scores_are_float32_under_autocast():
    """A product in bfloat16 has 8 bits: half of a batch would sit on the threshold."""
    module = routed_modules(routed_model())["1.attn"]
    hidden = torch.randn(4, 32)
    expected = hidden @ module.mod_router.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        assert module.mod_router(hidden).dtype == torch.float32
        assert torch.allclose(module.mod_router(hidden), expected, atol=1e-6)
        half = module.mod_router(hidden.bfloat16())
    assert torch.allclose(half, hidden.bfloat16().float() @ module.mod_router.weight.T, atol=1e-6)


def test_routers_stay_float32_in_a_model_of_another_type(tmp_path):
    model, load = routed_model("llama", "attn_token+mlp_token"), AutoModelForCausalLM.from_pretrained
    model.save_pretrained(tmp_path / "routed")
    tiny_model().save_pretrained(tmp_path / "plain")
    others = {
        "cast": copy.deepcopy(model).to(torch.bfloat16),
        "halved": copy.deepcopy(model).half(),
        "loaded": load(tmp_path / "routed", dtype=torch.bfloat16),
        "loaded as it is": load(tmp_path / "routed", dtype="auto"),
        "routed later": route(load(tmp_path / "plain", dtype=torch.bfloat16), mod_n=2),
    }
    for way, other in others.items():
        for name, parameter in other.named_parameters():
            assert (parameter.dtype == torch.float32) == ("mod_router" in name or way == "loaded as it is"), way
            if "mod_router" in name and way != "routed later":
                assert torch.equal(parameter, model.get_parameter(name)), f"{way}: bits must survive"


# ---------------------------------------------------------------- flex attention


@pytest.mark.parametrize("granularity", ["attn_token", "block_token", "attn_token+mlp_token"])
@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_token_level_attention_needs_a_mask_that_it_can_pack(granularity, policy):
    model = tiny_model(attn="flex_attention")
    with refused("'sdpa' or 'eager', not 'flex_attention'"):
        route(model, mod_layers=LAYERS, granularity=granularity, kv_policy=policy)


@pytest.mark.full  # a mask for flex attention is compiled
def test_nor_may_it_be_changed_behind_the_routing():
    late = routed_model("llama", "attn_token")
    late.set_attn_implementation("flex_attention")
    with refused("'sdpa' or 'eager', not 'flex_attention'"), torch.no_grad():
        late(random_batch()[0])


@pytest.mark.full
@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence", "mlp_sequence", "mlp_token"])
def test_flex_attention_serves_whole_sequences(granularity, monkeypatch):
    """Uncompiled, which is slow but the same arithmetic; rows of a block mask are selected with the batch."""

    def eager(query, key, value, training=False, **kwargs):
        return flex_attention.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", eager)
    model = routed_model("llama", granularity)
    ids, mask = random_batch(4, 12, padding="left")
    expected = run(model, ids, mask)
    cached = run(model, ids, mask, "cached")
    model.set_attn_implementation("flex_attention")
    with record_routing(model) as log:
        actual = run(model, ids, mask)
    assert 0 < log.capacity()["total"] < 1
    assert (actual - expected)[mask.bool()].abs().max() <= 1e-4
    assert (run(model, ids, mask, "cached") - cached)[mask.bool()].abs().max() <= 1e-4


@pytest.mark.parametrize("granularity", ["attn_token", "attn_token+mlp_token", "block_token"])
def test_rows_that_fill_up_a_product_on_a_cpu_change_nothing(granularity, monkeypatch):
    """Of 3 × 90 tokens some are computed twice, so that the numbers of rows of products in half precision recur."""
    model = routed_model("llama", granularity, skip="low_rank", skip_rank=3).to(torch.bfloat16)
    ids, mask = random_batch(rows=3, tokens=90, padding="right")
    found = []
    for rows in (1, packing._ROWS):
        monkeypatch.setattr(packing, "_ROWS", rows)
        with force_routing(model, masks(3, 90)):
            found.append(run(model, ids, mask)[mask == 1])
    torch.testing.assert_close(*found, atol=0.02, rtol=0.02)
    index = torch.arange(130)
    assert packing.evened(index, torch.empty(0)) is index
    filled = packing.evened(index, torch.empty(0, dtype=torch.bfloat16))
    assert len(filled) == 192 and filled[:130].equal(index) and filled[130:].eq(129).all()
