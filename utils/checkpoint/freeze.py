"""A learned policy turned into a fixed one that stock runtimes load without custom code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.errors import UserError
from router_tuning.files import new_folder, write_json
from router_tuning.model import routed_modules, unroute
from router_tuning.model.modules import decoder_of

MARKER = "frozen_routing.json"
OUTPUTS = {"attn": ("o_proj", "dense", "out_proj"), "mlp": ("down_proj", "fc2", "dense_4h_to_h")}


@dataclass(frozen=True)
class Frozen:
    """What a frozen checkpoint leaves out: ``removed`` layers, and ``silenced`` modules (``"<layer>.<part>"``).

    ``lost`` are those of them whose skip path the checkpoint cannot hold.
    """

    removed: tuple[int, ...]
    silenced: tuple[str, ...]
    kept: tuple[str, ...]
    lost: tuple[str, ...]


@torch.no_grad()
def freeze(model: PreTrainedModel, dropped: Sequence[str]) -> Frozen:
    """Make the routed ``model`` dense in place, without the modules of the ``dropped`` routers; all others always run.

    A block is taken out of the decoder (fewer layers, less work everywhere). Plain configurations cannot say "layer
    without attention", so an attention or MLP keeps its place and its output projection becomes zero: the numbers are
    exactly those of skipping it, the work is not saved. A skip path that is a mean becomes the projection's bias where
    there is one; any other is lost.

    Raises:
        UserError: for a dropped router that the model lacks, for experts, and for an output projection that is not
            found under a known name.
    """
    modules = routed_modules(model)
    if unknown := [name for name in dropped if name not in modules]:
        raise UserError(f"no routers named {', '.join(unknown)}; the model has {', '.join(modules)}")
    if experts := [name for name in dropped if name.endswith(".expert")]:
        raise UserError(f"{', '.join(experts)}: a fixed policy for single experts has no plain form")
    removed = tuple(int(name.split(".")[0]) for name in dropped if name.endswith(".block"))
    projections = {name: _output_projection(name, modules[name]) for name in dropped if not name.endswith(".block")}
    paths = {name: path for name in dropped if (path := modules[name].mod_skip) is not None}
    kept = tuple(name for name in modules if name not in dropped)
    unroute(model)
    for name, projection in projections.items():
        projection.weight.zero_()
        if projection.bias is not None:
            projection.bias.zero_()
            if name in paths and paths[name].down is None:
                projection.bias.copy_(paths.pop(name).bias)
    if removed:
        _remove_layers(model, removed)
    return Frozen(removed, tuple(projections), kept, tuple(paths))


def write_frozen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, facts: dict, card: str, overwrite: bool
) -> None:
    """Save a frozen model as a plain checkpoint of its family, with ``facts`` as JSON and the model card."""
    with new_folder(output, overwrite, MARKER) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        write_json(staged / MARKER, facts)
        (staged / "README.md").write_text(card, encoding="utf-8")


def _output_projection(name: str, module: nn.Module) -> nn.Linear:
    for candidate in OUTPUTS[name.split(".")[1]]:
        projection = getattr(module, candidate, None)
        if isinstance(projection, nn.Linear):
            return projection
    raise UserError(f"router {name}: {type(module).__name__} has no output projection under a known name")


def _remove_layers(model: PreTrainedModel, removed: Sequence[int]) -> None:
    decoder, config = decoder_of(model), model.config
    layers = [layer for number, layer in enumerate(decoder.layers) if number not in removed]
    if not layers:
        raise UserError("every layer would be removed; raise --max_use less")
    for number, layer in enumerate(layers):
        for module in layer.modules():  # the place of its keys in the cache
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    decoder.layers = nn.ModuleList(layers)
    config.num_hidden_layers = len(layers)
    for field in ("layer_types", "no_rope_layers"):
        values = getattr(config, field, None)
        if values:
            setattr(config, field, [value for number, value in enumerate(values) if number not in removed])
    with torch.device("meta"):
        described = AutoModelForCausalLM.from_config(config).state_dict()
    if {name: t.shape for name, t in described.items()} != {name: t.shape for name, t in model.state_dict().items()}:
        raise UserError(f"a configuration of {config.model_type} cannot say that layers {removed} are gone: their "
                        "kinds follow from their numbers; route attention or MLPs")  # fmt: skip
