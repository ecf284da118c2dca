"""What the cache holds: exact bytes under forced masks, refusal of foreign caches, packed inputs."""

from __future__ import annotations

import pytest
import torch
from refused import refused
from tiny_models import random_batch, reset_empties, tiny_model
from tiny_routed import KINDS, LAYERS, routed_model, with_reference
from transformers import DynamicCache, StaticCache

from router_tuning.model import force_routing, kv_cache_bytes, route
from router_tuning.model.cache_mod import RowCacheLayer

ROWS, PROMPT, STEPS = 3, 7, 3
TOTAL = PROMPT + STEPS
HEADS, WIDTH, DEPTH = 2, 8, 5


def forced_masks(granularity, share):
    """For each routed layer a bool [b] or [b, T] that keeps about a share."""
    generator = torch.Generator().manual_seed(5)
    shape = (ROWS,) if "sequence" in granularity else (ROWS, TOTAL)
    return {layer: torch.rand(shape, generator=generator) < share for layer in LAYERS}


@torch.no_grad()
def decode(model, ids, cache=None):
    """Prefill and single steps."""
    cache = model(ids[:, :PROMPT], past_key_values=cache, use_cache=True).past_key_values
    for step in range(PROMPT, TOTAL):
        model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize(("share", "dtype"), [(0.0, torch.bfloat16), (0.5, torch.float32)])
@pytest.mark.parametrize(
    ("family", "granularity", "policy"),
    [
        *[("llama", *kind) for kind in (*KINDS, ("attn_sequence+mlp_token", "keep"))],
        *[("mistral", "attn_sequence", "keep"), ("mistral", "attn_token", "drop")],
    ],
)
def test_bytes_are_exactly_those_of_executed_rows_and_tokens(family, granularity, policy, share, dtype):
    """A sliding layer of transformers holds window − 1 past tokens and, as a view of them, the newest one."""
    model = route(tiny_model(family).to(dtype), mod_layers=LAYERS, granularity=granularity, kv_policy=policy)
    part, level = granularity.split("+")[0].split("_")
    masks = forced_masks(granularity, share)
    with force_routing(model, {(layer, part): mask for layer, mask in masks.items()}):
        cache = decode(model, random_batch(ROWS, TOTAL)[0])
    window = getattr(model.config, "sliding_window", None)
    held = window or TOTAL
    tokens = (DEPTH - len(LAYERS)) * ROWS * held
    for mask in masks.values():
        if part == "mlp" or (level == "token" and policy == "keep"):
            tokens += ROWS * held
        elif level == "token":
            tokens += int(mask[:, TOTAL - window + 1 if window else 0 :].sum())
        else:
            tokens += int(mask.sum()) * held
    assert kv_cache_bytes(cache) == 2 * HEADS * WIDTH * dtype.itemsize * tokens
    assert cache.get_seq_length() == TOTAL


def test_bytes_follow_selected_repeated_and_cropped_rows():
    model = route(tiny_model(), mod_layers=LAYERS)
    unit = 2 * HEADS * WIDTH * 4
    with force_routing(model, {layer: torch.tensor([True, False, True]) for layer in LAYERS}):
        cache = decode(model, random_batch(ROWS, TOTAL)[0])
    assert kv_cache_bytes(cache) == unit * TOTAL * (2 * 3 + 3 * 2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert kv_cache_bytes(cache) == unit * TOTAL * (2 * 2 + 3 * 1)
    cache.batch_repeat_interleave(2)
    assert kv_cache_bytes(cache) == unit * TOTAL * (2 * 4 + 3 * 2)
    assert [int(layer.mod_rows.sum()) for layer in cache.layers if isinstance(layer, RowCacheLayer)] == [2, 2, 2]
    cache.reset()
    assert kv_cache_bytes(cache) == 0 or not reset_empties()


# ---------------------------------------------------------------- foreign caches


@pytest.mark.parametrize(
    ("granularity", "policy"),
    [(g, "keep") for g in ("attn_sequence", "mlp_sequence", "attn_token")] + [("attn_token", "drop"), KINDS[-1]],
)
def test_foreign_caches_are_refused_in_one_line(granularity, policy):
    model, (ids, _) = tiny_model(), random_batch(ROWS, TOTAL)
    dense = decode(model, ids)
    route(model, mod_layers=LAYERS, granularity=granularity, kv_policy=policy)
    quantized = DynamicCache(config=model.config)
    for layer in quantized.layers:  # as its layers are: of a subclass of the dynamic one, which stores otherwise
        layer.__class__ = type("QuantizedLayer", (type(layer),), {})
    tuples = ((torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8)),) * DEPTH
    for cache in (StaticCache(config=model.config, max_cache_len=32), quantized, tuples):
        with refused("DynamicCache"):
            model(ids, past_key_values=cache)
    if (granularity, policy) != ("attn_token", "keep"):
        with refused("filled without routing"):
            model(ids[:, :1], past_key_values=dense)
    assert all(type(layer).__name__ == "DynamicLayer" for layer in dense.layers), "it stays usable for the dense one"


def test_a_cache_of_another_routing_is_refused():
    ids, _ = random_batch(ROWS, TOTAL)
    cache = decode(route(tiny_model(), mod_layers=[1, 2], granularity="attn_sequence"), ids)
    others = [
        ({"mod_layers": [1, 2], "granularity": "attn_sequence+mlp_sequence"}, "no decision for 'mlp'"),
        ({"mod_layers": [1, 2], "granularity": "attn_token", "kv_policy": "drop"}, "another routing"),
        ({"mod_layers": [1, 2], "granularity": "attn_token"}, "another routing"),
        ({"mod_layers": [2, 3], "granularity": "attn_sequence"}, "layer 1: .* another routing"),
    ]
    with torch.no_grad():
        for model, words in [(route(tiny_model(), **routing), words) for routing, words in others]:
            with refused(words):
                model(ids[:, :1], past_key_values=cache)
    cache.reset()
    for routing, _ in others if reset_empties() else ():
        model = route(tiny_model(), **routing)
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)
        cache.reset()


def test_a_static_cache_serves_routed_mlps():
    model = routed_model("llama", "mlp_token")
    ids, _ = random_batch(ROWS, TOTAL)
    static = StaticCache(config=model.config, max_cache_len=TOTAL)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        prefill = model(ids[:, :PROMPT], past_key_values=static).logits
        steps = [model(ids[:, n : n + 1], past_key_values=static).logits for n in range(PROMPT, TOTAL)]
    assert torch.allclose(torch.cat([prefill, *steps], 1), whole, atol=1e-5)


# ---------------------------------------------------------------- two sequences in one row, told apart by positions

POSITIONS = torch.cat([torch.arange(5), torch.arange(7)])[None]


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence", "attn_token+mlp_sequence"])
def test_packed_sequences_are_refused_at_sequence_level(granularity):
    ids, model = random_batch(1, 12)[0], routed_model("llama", granularity)
    for use_cache in (False, True):
        with refused("packed"):
            model(ids, position_ids=POSITIONS, use_cache=use_cache)
    model(ids, position_ids=torch.arange(12)[None])


@pytest.mark.parametrize(
    ("granularity", "policy"),
    [("attn_token", "keep"), ("attn_token", "drop"), ("mlp_token", "keep"), ("block_token", "drop")],
)
def test_packed_sequences_are_right_at_token_level(granularity, policy):
    ids, (model, reference) = random_batch(1, 12)[0], with_reference("llama", granularity, policy)
    with torch.no_grad():
        packed = model(ids, position_ids=POSITIONS, use_cache=False).logits
    alone = torch.cat([reference.logits(part) for part in (ids[:, :5], ids[:, 5:])], 1)
    assert torch.allclose(packed, alone, atol=1e-4)
