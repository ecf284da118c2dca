"""What the cache holds: exact bytes under forced masks, refusal of foreign caches, packed inputs."""

import pytest
import torch
from refused import refused
from tiny_models import random_batch, reset_empties, tiny_model
from tiny_routed import KINDS, LAYERS, routed_model, with_reference
from transformers import DynamicCache, StaticCache

from router_tuning.model import force_routing, kv_cache_bytes, route
from router_tuning.model.cache_mod import RowCacheLayer

ROWS, PROMPT, TOTAL = 3, 7, 10
IDS, _ = random_batch(ROWS, TOTAL)
HEADS, WIDTH, DEPTH = 2, 8, 5


@torch.no_grad()
def decode(model, cache=None):
    """The cache behind a prefill and single steps, and the logits of all."""
    parts = []
    for start, end in ((0, PROMPT), *((step, step + 1) for step in range(PROMPT, TOTAL))):
        out = model(IDS[:, start:end], past_key_values=cache, use_cache=True)
        parts, cache = [*parts, out.logits], out.past_key_values
    return cache, torch.cat(parts, 1)


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
    shape, generator = (ROWS,) if level == "sequence" else (ROWS, TOTAL), torch.Generator().manual_seed(5)
    masks = {(layer, part): torch.rand(shape, generator=generator) < share for layer in LAYERS}
    with force_routing(model, masks):
        cache, _ = decode(model)
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
    assert kv_cache_bytes(cache) == 2 * HEADS * WIDTH * dtype.itemsize * tokens and cache.get_seq_length() == TOTAL


def test_bytes_follow_selected_repeated_and_cropped_rows():
    model = route(tiny_model(), mod_layers=LAYERS)
    unit = 2 * HEADS * WIDTH * 4 * TOTAL
    with force_routing(model, {layer: torch.tensor([True, False, True]) for layer in LAYERS}):
        cache, _ = decode(model)
    assert kv_cache_bytes(cache) == unit * (2 * 3 + 3 * 2)
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert kv_cache_bytes(cache) == unit * (2 * 2 + 3 * 1)
    cache.batch_repeat_interleave(2)
    assert kv_cache_bytes(cache) == unit * (2 * 4 + 3 * 2)
    assert [int(layer.mod_rows.sum()) for layer in cache.layers if isinstance(layer, RowCacheLayer)] == [2, 2, 2]
    cache.reset()
    assert kv_cache_bytes(cache) == 0 or not reset_empties()


# ---------------------------------------------------------------- foreign caches


@pytest.mark.parametrize(
    ("granularity", "policy"),
    [(g, "keep") for g in ("attn_sequence", "mlp_sequence", "attn_token")] + [("attn_token", "drop"), KINDS[-1]],
)
def test_foreign_caches_are_refused_in_one_line(granularity, policy):
    model = tiny_model()
    dense, _ = decode(model)
    route(model, mod_layers=LAYERS, granularity=granularity, kv_policy=policy)
    quantized = DynamicCache(config=model.config)
    for layer in quantized.layers:  # as its layers are: of a subclass of the dynamic one, which stores otherwise
        layer.__class__ = type("QuantizedLayer", (type(layer),), {})
    tuples = ((torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8)),) * DEPTH
    for cache in (StaticCache(config=model.config, max_cache_len=32), quantized, tuples):
        with refused("DynamicCache"):
            model(IDS, past_key_values=cache)
    if (granularity, policy) != ("attn_token", "keep"):
        with refused("filled without routing"):
            model(IDS[:, :1], past_key_values=dense)
    assert all(type(layer).__name__ == "DynamicLayer" for layer in dense.layers), "it stays usable for the dense one"


def test_a_cache_of_another_routing_is_refused_until_it_is_empty():
    cache, _ = decode(route(tiny_model(), mod_layers=[1, 2], granularity="attn_sequence"))
    others = [
        ({"mod_layers": [1, 2], "granularity": "attn_sequence+mlp_sequence"}, "no decision for 'mlp'"),
        ({"mod_layers": [1, 2], "granularity": "attn_token", "kv_policy": "drop"}, "another routing"),
        ({"mod_layers": [1, 2], "granularity": "attn_token"}, "another routing"),
        ({"mod_layers": [2, 3], "granularity": "attn_sequence"}, "layer 1: .* another routing"),
    ]
    models = [(route(tiny_model(), **routing), words) for routing, words in others]
    for model, words in models:
        with refused(words), torch.no_grad():
            model(IDS[:, :1], past_key_values=cache)
    for model, _ in models if reset_empties() else ():
        cache.reset()
        assert torch.equal(model(IDS, past_key_values=cache).logits, model(IDS, use_cache=False).logits)


def test_a_static_cache_serves_routed_mlps():
    model = routed_model("llama", "mlp_token")
    _, logits = decode(model, StaticCache(config=model.config, max_cache_len=TOTAL))
    assert torch.allclose(logits, model(IDS, use_cache=False).logits, atol=1e-5)


# ---------------------------------------------------------------- two sequences in one row, told apart by positions

PACKED = {"input_ids": random_batch(1, 12)[0], "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence", "attn_token+mlp_sequence"])
def test_packed_sequences_are_refused_at_sequence_level(granularity):
    model = routed_model("llama", granularity)
    for use_cache in (False, True):
        with refused("packed"):
            model(**PACKED, use_cache=use_cache)
    model(PACKED["input_ids"], position_ids=torch.arange(12)[None])


@pytest.mark.parametrize(
    ("granularity", "policy"),
    [("attn_token", "keep"), ("attn_token", "drop"), ("mlp_token", "keep"), ("block_token", "drop")],
)
@torch.no_grad()
def test_packed_sequences_are_right_at_token_level(granularity, policy):
    """With skip paths each of them has a first token, which runs."""
    model, reference = with_reference("llama", granularity, policy, skip="low_rank")
    ids = PACKED["input_ids"]
    alone = torch.cat([reference.logits(part) for part in (ids[:, :5], ids[:, 5:])], 1)
    assert torch.allclose(model(**PACKED, use_cache=False).logits, alone, atol=1e-4)
