"""Half-precision weights, autocast and attention implementations: as close to float32 as the dense model is."""

import copy
import functools

import pytest
import torch
from refused import refused
from tiny_models import random_batch, tiny_model
from tiny_routed import CASES, routed_model
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM
from transformers.integrations import flex_attention as integration

from router_tuning.model import force_routing, packing, record_routing, route, routed_modules

IDS, MASK = random_batch(padding="left")


def imposed(rows, tokens):
    """Decisions of every router for this batch, imposed so that two dtypes compute the same thing.

    Both experts of a token share one: which of them comes first is a matter of rounding.
    """

    def decision(layer, part, shape, past):
        generator = torch.Generator().manual_seed(10 * layer + len(part))
        mask = torch.rand(rows, tokens, generator=generator) < 0.6
        if part == "expert":
            return mask[:, past : past + shape[0] // rows].flatten()[:, None].expand(shape)
        return mask[:, 0] if len(shape) == 1 else mask[:, past : past + shape[1]]

    return decision


def run(model, way="whole", ids=IDS, mask=MASK):
    """Logits of one pass, of several through a cache, or of one in training."""
    parts, cache = [], None
    with torch.set_grad_enabled(way == "training"):
        model.train(way == "training")
        for start, end in ((0, 8), (8, 11), (11, 12)) if way == "cached" else ((0, ids.shape[1]),):
            inputs = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": way == "cached"}
            out = model(ids[:, start:end], **inputs)
            parts, cache = [*parts, out.logits], out.past_key_values
    model.eval()
    return torch.cat(parts, 1).float().detach()


def deviation(family, one, other):
    """Largest difference of a token's logits: the worst token's, or the median token's of a mixture of experts.

    Where two experts are nearly tied, rounding chooses another one, and that token is simply elsewhere.
    """
    tokens = (one - other)[MASK.bool()].abs().amax(-1)
    return (tokens.median() if family == "mixtral" else tokens.max()).item()


def rounded(model, dtype):
    """A copy of a float32 model in ``dtype``, and the block in which it runs."""
    auto = dtype == "autocast"
    block = torch.autocast("cpu", torch.bfloat16, enabled=auto)
    return copy.deepcopy(model).to(torch.float32 if auto else dtype), block


@functools.cache
def dense_error(family, dtype):
    """How far the dense model in this dtype is from float32: the yardstick."""
    model = tiny_model(family)
    exact, (half, block) = run(model), rounded(model, dtype)
    with block:
        return deviation(family, exact, run(half))


@pytest.mark.parametrize(
    ("attn", "dtype"),
    [("sdpa", torch.bfloat16), ("eager", torch.bfloat16), ("sdpa", torch.float16), ("sdpa", "autocast")],
)
@pytest.mark.parametrize(("family", "granularity", "policy"), CASES)
def test_it_deviates_as_the_dense_model_does(family, granularity, policy, attn, dtype):
    exact = routed_model(family, granularity, attn, kv_policy=policy)
    half, block = rounded(exact, dtype)
    for way in ("whole", "cached", "training"):
        with force_routing(exact, imposed(*IDS.shape)):
            expected = run(exact, way)
        with force_routing(half, imposed(*IDS.shape)), block:
            actual = run(half, way)
        assert 0 < deviation(family, expected, actual) <= 3 * dense_error(family, dtype), way
    with record_routing(half) as log, block:
        own = run(half)
        half.generate(IDS, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        half.train()(IDS, attention_mask=MASK, labels=torch.where(MASK.bool(), IDS, -100)).loss.backward()
    assert torch.isfinite(own[MASK.bool()]).all() and 0 < log.capacity()["total"] < 1
    assert all(record.logits.dtype == torch.float32 for records in log.records.values() for record in records)
    for module in routed_modules(half).values():
        gradient = module.mod_router.weight.grad
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_scores_are_float32_under_autocast():
    """A product in bfloat16 has 8 bits: half of a batch would sit on the threshold."""
    router, hidden = routed_modules(routed_model())["1.attn"].mod_router, torch.randn(4, 32)
    for given in (hidden, hidden.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            logits = router(given)
        assert logits.dtype == torch.float32 and torch.allclose(logits, given.float() @ router.weight.T, atol=1e-6)


def test_routers_stay_float32_in_a_model_of_another_type(tmp_path):
    model, load = routed_model("llama", "attn_token+mlp_token"), AutoModelForCausalLM.from_pretrained
    model.save_pretrained(tmp_path)
    bits = {name: weight for name, weight in model.state_dict().items() if "mod_router" in name}
    cast, loaded = copy.deepcopy(model).to(torch.bfloat16), load(tmp_path, dtype=torch.bfloat16)
    for other in (cast, copy.deepcopy(model).half(), loaded, load(tmp_path, dtype="auto")):
        assert all(torch.equal(other.get_parameter(name), weight) for name, weight in bits.items())
    for other in (cast, loaded, route(tiny_model().bfloat16(), mod_n=2)):
        for name, parameter in other.named_parameters():
            assert parameter.dtype == (torch.float32 if "mod_router" in name else torch.bfloat16)


@pytest.mark.parametrize("granularity", ["attn_token", "attn_token+mlp_token", "block_token"])
def test_rows_that_fill_up_a_product_on_a_cpu_change_nothing(granularity, monkeypatch):
    """Of 3 × 90 tokens some are computed twice, so that the numbers of rows of products in half precision recur."""
    model = routed_model("llama", granularity, skip="low_rank", skip_rank=3).to(torch.bfloat16)
    ids, mask = random_batch(rows=3, tokens=90, padding="right")
    found = []
    for rows in (1, packing._ROWS):
        monkeypatch.setattr(packing, "_ROWS", rows)
        with force_routing(model, imposed(3, 90)):
            found.append(run(model, ids=ids, mask=mask)[mask == 1])
    torch.testing.assert_close(*found, atol=0.02, rtol=0.02)
    index = torch.arange(130)
    assert packing.evened(index, torch.empty(0)) is index
    filled = packing.evened(index, torch.empty(0, dtype=torch.bfloat16))
    assert len(filled) == 192 and filled[:130].equal(index) and filled[130:].eq(129).all()


# ---------------------------------------------------------------- flex attention


@pytest.mark.parametrize(
    ("granularity", "when"),
    [
        *[(granularity, "before") for granularity in ("attn_token", "block_token", "attn_token+mlp_token")],
        pytest.param("attn_token", "behind", marks=pytest.mark.full),  # a mask for flex attention is compiled
    ],
)
def test_token_level_attention_needs_a_mask_that_it_can_pack(granularity, when):
    model = tiny_model(attn="flex_attention" if when == "before" else "sdpa")
    with refused("'sdpa' or 'eager', not 'flex_attention'"), torch.no_grad():
        routed_model(granularity=granularity, model=model)
        model.set_attn_implementation("flex_attention")
        model(IDS)


@pytest.mark.full
@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence", "mlp_sequence", "mlp_token"])
def test_flex_attention_serves_whole_sequences(granularity, monkeypatch):
    """Uncompiled, which is slow but the same arithmetic; rows of a block mask are selected with the batch."""

    def eager(query, key, value, training=False, **kwargs):
        return flex_attention.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", eager)
    model, ways = routed_model("llama", granularity), ("whole", "cached")
    expected = {way: run(model, way) for way in ways}
    model.set_attn_implementation("flex_attention")
    for way in ways:
        with record_routing(model) as log, torch.no_grad():
            found = run(model, way)
        assert 0 < log.capacity()["total"] < 1 and (found - expected[way])[MASK.bool()].abs().max() <= 1e-4
