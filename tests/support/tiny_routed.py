"""Routed tiny models whose routers really split the test inputs."""

from __future__ import annotations

import copy
import functools
from contextlib import ExitStack

import torch
from masked_reference import MaskedReference
from tiny_models import random_batch, tiny_model

from router_tuning.model import GRANULARITIES, route, routed_modules
from router_tuning.model.configuration_mod import parse_granularity
from router_tuning.model.modules import decoder_of

LAYERS = [1, 2, 3]
PLAIN = tuple(name for name in GRANULARITIES if "expert" not in name)
KEYS = ("attn_token", "block_token")
"""Granularities at which the policy of keys makes a difference."""
KINDS = [(g, policy) for g in PLAIN for policy in ("keep", "drop") if policy == "keep" or g in KEYS]
"""Granularities of one router a module, with both policies of keys where they differ."""
CACHED = [kind for kind in KINDS if kind not in (("mlp_token", "keep"), ("block_token", "keep"))]
"""Where a cache has to hold something: decisions, or fewer keys."""
DENSE = [*KINDS, ("attn_token+mlp_token", "keep"), ("attn_sequence+mlp_token", "keep")]
"""Granularities that a family without experts has."""
CASES = [*[("llama", *kind) for kind in DENSE], ("mixtral", "expert_token", "keep")]
"""Every granularity with both key policies where they differ, on a family that has it."""


def routed_model(
    family: str = "llama", granularity: str = "attn_sequence", attn: str = "sdpa", seed: int = 0, model=None, **options
):
    """A tiny model, routed in :data:`LAYERS` unless ``mod_layers`` is given; other options go to ``route``."""
    model = tiny_model(family, attn, seed=seed) if model is None else model
    route(model, granularity=granularity, **{"mod_layers": LAYERS, **options})
    split_inputs(model, seed)
    return model


def with_reference(family="llama", granularity="attn_sequence", policy="keep", attn="sdpa", model=None, **options):
    """A routed model whose routers split the test inputs, with skip paths that matter, and what it must equal."""
    model = tiny_model(family, attn) if model is None else model
    dense = copy.deepcopy(model)
    route(model, granularity=granularity, kv_policy=policy, **{"mod_layers": LAYERS, "skip_rank": 3, **options})
    paths = random_skip_paths(model)
    split_inputs(model)
    dense.model = decoder_of(dense)
    parts = parse_granularity(granularity)
    return model, MaskedReference(dense, router_weights(model), parts, policy, paths=paths)


@torch.no_grad()
def split_inputs(model, seed: int = 0) -> None:
    """Random router directions orthogonal to the mean feature: about half of rows and tokens fall on either side."""

    def aim(layer, router, args):
        mean = args[0].float().flatten(0, -2).mean(0)
        weight = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(100 * seed + layer))
        router.weight.copy_(weight - (weight @ mean)[:, None] * mean / mean.dot(mean).clamp(min=1e-6))

    with ExitStack() as stack:  # each is aimed just before it decides: what it sees depends on those before it
        for module in routed_modules(model).values():
            hook = functools.partial(aim, module.mod_layer)
            stack.callback(module.mod_router.register_forward_pre_hook(hook).remove)
        ids, mask = random_batch(rows=6)
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def router_weights(model) -> dict:
    """``{(layer, part): weight}``, what the masked reference takes."""
    return {(m.mod_layer, m.mod_part): m.mod_router.weight.detach() for m in routed_modules(model).values()}


@torch.no_grad()
def random_skip_paths(model) -> dict:
    """Fill the skip paths of a routed model; ``{(layer, part): (U, V, b)}``, what the masked reference takes."""
    paths = {}
    for module in routed_modules(model).values():
        if module.mod_skip is not None:
            path, generator = module.mod_skip, torch.Generator().manual_seed(module.mod_layer)
            for parameter in path.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            none = torch.zeros(len(path.bias), 1)
            down, up = (none, none.T) if path.down is None else (path.down, path.up)
            paths[module.mod_layer, module.mod_part] = (down, up, path.bias)
    return paths
