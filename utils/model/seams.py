"""The seams of transformers' decoders that routing needs: found by name, and tried out on families not yet proven."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .configuration_mod import ModConfig
from .keys_values import missing_seam, project_kv
from .packing import check_packable

WHERE = {"attn": ("self_attn",), "mlp": ("mlp",), "block": (), "expert": ("mlp", "experts")}
# Families on which tests compare every granularity with a masked dense model. Others are tried out when routed.
PROVEN = frozenset(
    "cohere gemma2 gemma3_text glm4 granite llama mistral mixtral olmo2 olmoe phi phi3 qwen2 qwen2_moe qwen3 "
    "qwen3_moe smollm3".split()
)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The decoder with ``layers``; ValueError naming the missing seam for other architectures."""
    decoder = getattr(model, model.base_model_prefix, model)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(f"{type(model).__name__} cannot be routed: its decoder has no 'layers'")
    return decoder


def find_module(model: PreTrainedModel, layer: int, part: str, kv_policy: str, level: str) -> nn.Module:
    """The module that a part of a layer names; ValueError naming the missing seam."""
    module = decoder_of(model).layers[layer]
    for name in WHERE[part]:
        if not isinstance(getattr(module, name, None), nn.Module):
            raise ValueError(
                f"layer {layer} of {type(model).__name__} cannot be routed as {part!r}: it has no {name!r}"
            )
        module = getattr(module, name)
    if part in ("attn", "block"):
        attention = module if part == "attn" else getattr(module, "self_attn", None)
        if attention is None:
            raise ValueError(
                f"layer {layer} of {type(model).__name__} cannot be routed as {part!r}: it has no 'self_attn'"
            )
        if level == "token":
            check_packable(attention, layer)
        seam = missing_seam(attention) if level == "token" and kv_policy == "keep" else None
        if seam:
            raise ValueError(
                f"layer {layer} of {type(model).__name__} cannot keep keys of skipped tokens: its attention has no "
                f"{seam!r}; use kv_policy 'drop' or sequence level"
            )
    return module


def try_seams(model: PreTrainedModel, targets: Iterable[tuple[int, str]], config: ModConfig) -> None:
    """Run a dense family that no test holds on three tokens and look at what passes through its seams.

    Some decoders have modules of the right names that mean something else: an MLP that returns a tuple, rotary
    embeddings in some layers only, a norm under another name. Models on the meta device cannot be tried.

    Raises:
        ValueError: one line that names the layer and what is odd about it.
    """
    decoder, name = decoder_of(model), type(model).__name__
    if decoder.config.model_type.removesuffix("_mod") in PROVEN or _without_weights(decoder):
        return
    keeps = config.kv_policy == "keep" and "token" in (config.parts.get("attn"), config.parts.get("block"))
    cache, ids = DynamicCache(config=decoder.config), torch.tensor([[3, 4, 5]], device=model.device)
    with _dense_evaluation(decoder), _watching(decoder, targets) as seen:
        try:
            decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        except Exception as error:
            raise ValueError(f"{name} cannot be routed: a trial pass failed ({error!r:.200})") from None
        for layer, part in targets:
            odd = _odd_module(part, seen, layer) or _odd_cache(config.parts, cache.layers[layer])
            if keeps and part in ("attn", "block"):
                odd = odd or _odd_keys(decoder.layers[layer], part, seen, layer, cache.layers[layer])
            if odd:
                raise ValueError(f"layer {layer} of {name} cannot be routed as {config.granularity!r}: {odd}")


def _odd_module(part: str, seen: dict, layer: int) -> str | None:
    """Whether a module maps one tensor of hidden states to one of the same shape, as its mixin takes for granted."""
    if (layer, part) not in seen:
        return f"its {part} module takes no part in the forward pass"
    args, kwargs, output = seen[layer, part]
    hidden = args[0] if args else kwargs.get("hidden_states")
    if part == "attn":
        if args or not isinstance(output, tuple) or len(output) != 2:
            return "its attention is not called by keyword for a pair (output, weights)"
        output = output[0]
    elif (part == "block" and len(args) != 1) or (part == "mlp" and (len(args) != 1 or kwargs)):
        return f"its {part} module is not called with its hidden states alone"
    if not isinstance(output, Tensor) or not isinstance(hidden, Tensor) or output.shape != hidden.shape:
        return f"its {part} module does not return one tensor of the shape of its input"
    return None


def _odd_cache(parts: Mapping[str, str], stored: Any) -> str | None:
    if "sequence" not in parts.values() and not {"attn", "block"} & set(parts):
        return None
    if type(stored) in (DynamicLayer, DynamicSlidingWindowLayer) and isinstance(stored.keys, Tensor):
        return None
    return f"its cache layer is a {type(stored).__name__}, routing knows keys and values only"


def _odd_keys(block: nn.Module, part: str, seen: dict, layer: int, stored: Any) -> str | None:
    """Whether :func:`project_kv` gives what the attention caches, from what the mixin will call its input."""
    if (layer, "inner") not in seen:
        return "its attention is not called by keyword"
    kwargs = seen[layer, "inner"][1]
    hidden, embeddings = kwargs["hidden_states"], kwargs.get("position_embeddings")
    advice = "; use kv_policy 'drop' or sequence level"
    if part == "block":
        args, block_kwargs, _ = seen[layer, "block"]
        entered = args[0] if args else block_kwargs["hidden_states"]
        norm = getattr(block, "input_layernorm", None)
        if norm is None or not torch.equal(norm(entered), hidden):
            return f"its attention reads something else than input_layernorm of the layer's input{advice}"
    if not isinstance(embeddings, tuple):
        return f"its attention receives no position_embeddings (cos, sin){advice}"
    for ours, theirs in zip(
        project_kv(block.self_attn, hidden, embeddings), (stored.keys, stored.values), strict=True
    ):
        if ours.shape != theirs.shape or not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2):
            return f"the keys and values that it caches are not those of its projections{advice}"
    return None


@contextmanager
def _watching(decoder: nn.Module, targets: Iterable[tuple[int, str]]) -> Iterator[dict]:
    """Collect ``{(layer, part): (args, kwargs, output)}`` of modules; ``inner`` is the attention of any layer."""
    seen: dict[tuple[int, str], tuple] = {}
    handles = []
    for layer, part in targets:
        block = decoder.layers[layer]
        watched = {part: functools.reduce(getattr, WHERE[part], block)}
        if isinstance(getattr(block, "self_attn", None), nn.Module):
            watched["inner"] = block.self_attn
        for name, module in watched.items():

            def look(_, args, kwargs, output, key=(layer, name)):
                seen[key] = (args, kwargs, output)

            handles.append(module.register_forward_hook(look, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _dense_evaluation(decoder: nn.Module) -> Iterator[None]:
    """No gradient, no dropout; every module's own mode afterwards."""
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _without_weights(decoder: nn.Module) -> bool:
    meta = any(parameter.is_meta for parameter in decoder.parameters())
    return meta and not any(hasattr(module, "_hf_hook") for module in decoder.modules())
