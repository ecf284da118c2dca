"""What of a base is routed, and what skipped tokens get: both measured on the training data, before routers train."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from router_tuning.model import ModConfig, fit_skip_paths, route, routed_modules, unroute
from router_tuning.model.flops import saved_shares
from router_tuning.model.recording import routed_base
from router_tuning.tuning.command.arguments import RoutingArguments, layers_text
from router_tuning.tuning.recipes.budget.damage import damage_in_parts

PATH_TOKENS = 12_000
"""Tokens that skip paths are fitted on."""
CHOICE_TOKENS = 4_000
"""Tokens on which the importance of modules is estimated."""
_AT_ONCE = 2**30
"""Bytes of module inputs that one pass of :func:`importance` holds."""
logger = logging.getLogger(__name__)


def candidates(config: ModConfig, layers: int) -> dict[str, list[int]]:
    """What ``mod_layers: auto`` chooses from: everything of the routed parts but the first MLP.

    Skipping that one costs far more than a second-order estimate says (3.7 nats in SmolLM2-135M).
    """
    return {part: list(range(0 if part == "attn" else 1, layers)) for part in config.parts}


@torch.no_grad()
def importance(
    model: PreTrainedModel, config: ModConfig, batches: Sequence[Mapping[str, Tensor]], seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Of every candidate what skipping it for all tokens would cost, and what it would save.

    The model is routed at token level with fitted skip paths meanwhile and dense again when this returns.

    Args:
        model: dense. config: parts and skip path; its layers do not matter.
        batches: ``input_ids``, ``attention_mask`` and ``labels``, right-padded.

    Returns:
        By ``"<layer>.<part>"`` an estimate of the divergence from the dense model, in nats per token
        (:mod:`~router_tuning.tuning.recipes.budget.damage`), and the share of the decoder's operations.
    """
    layers = candidates(config, model.config.get_text_config().num_hidden_layers)
    parts = "+".join(f"{part}_token" for part in layers)
    route(model, mod_layers=layers, granularity=parts, skip=config.skip, skip_rank=config.skip_rank)
    try:
        fit_skip_paths(model, batches, config.skip, config.skip_rank)
        names, saved = list(routed_modules(model)), saved_shares(model)
        estimates = damage_in_parts(model, batches, names, seed, _AT_ONCE)
        return {name: (damage.mean(), saved[name]) for name, damage in estimates}
    finally:
        unroute(model)


def chosen_layers(found: Mapping[str, tuple[float, float]], count: int) -> dict[str, list[int]]:
    """The ``count`` modules of least damage per operation saved, and at least one of each part, as layers by part."""
    ranked = sorted(found, key=lambda name: found[name][0] / found[name][1])
    part_of = {name: name.split(".")[1] for name in ranked}
    first = {part_of[name]: name for name in reversed(ranked)}
    kept = [name for name in ranked if name not in first.values()][: max(0, count - len(first))]
    layers: dict[str, list[int]] = {part: [] for part in sorted(first)}
    for name in sorted([*first.values(), *kept], key=lambda name: int(name.split(".")[0])):
        layers[part_of[name]].append(int(name.split(".")[0]))
    return layers


def choose(
    model: PreTrainedModel, routing: RoutingArguments, batches: Sequence[Mapping[str, Tensor]], seed: int
) -> None:
    """Replace ``--mod_layers auto`` of ``routing`` by layers: ``mod_n`` of each part on average, else five sixths."""
    found = importance(model, routing.config(), batches, seed)
    number = model.config.get_text_config().num_hidden_layers
    parts = {name.split(".")[1] for name in found}
    count = len(parts) * (routing.mod_n or max(1, number * 5 // 6))
    layers = chosen_layers(found, count)
    routing.mod_layers = layers_text(layers)
    kept = [found[f"{layer}.{part}"][0] for part in layers for layer in layers[part]]
    logger.info(
        f"--mod_layers auto: {routing.mod_layers}, {len(kept)} of {len(found)} modules; skipping one for all tokens "
        f"costs {min(kept):.2g} to {max(kept):.2g} nats per token"
    )


def fit_paths(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Fit the skip paths that a routed model asks for; the share of each module's variance that its path explains.

    Raises:
        ValueError: for too few tokens to fit on.
    """
    config = routed_base(model).mod_config
    explained = fit_skip_paths(model, batches, config.skip, config.skip_rank)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    logger.info(
        f"skip paths: {config.skip}, which explain {sum(explained.values()) / len(explained):.0%} of the modules' "
        f"variance on average, fitted on {tokens:,} tokens"
    )
    return explained
