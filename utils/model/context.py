"""What one forward pass of a routed model knows: real tokens, the cache, forced masks, the recorder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# A layer index, or (layer, part) where several parts of a layer are routed.
RouterKey = int | tuple[int, str]
Forced = bool | Mapping[Any, Any] | Callable[..., Tensor]


@dataclass
class RoutingContext:
    """State of one forward pass; never kept on a module, so passes over one model cannot disturb each other.

    Attributes:
        real: bool ``[b, t]``, true for tokens that are not padding; None when all are real.
        pool: bool ``[b, t]``, tokens that count in a sequence's pooled feature; None when all count.
        first: bool ``[b, t]``, the first real token of each sequence, which runs where there is a skip path; or None.
        decides: whether sequences are decided on in this pass; else the cache holds all their decisions.
        decided: bool ``[b]``, the sequences that are; None when all are.
        blank: bool ``[b]``, sequences of which only padding has come so far; None when there is none.
        cache: the key/value cache, which also holds sequence-level decisions.
        past: tokens that the cache held before this pass.
        training: run every module densely and let the straight-through gradient pass.
        forced: decisions imposed by :func:`force_routing`.
        record: called as ``record(key, keep, logits, real)`` for each decision taken.
        observe: called as ``observe(module, features, update, keep, context)`` by modules, which then run densely.
    """

    real: Tensor | None = None
    pool: Tensor | None = None
    first: Tensor | None = None
    decides: bool = True
    decided: Tensor | None = None
    blank: Tensor | None = None
    cache: Any = None
    past: int = 0
    training: bool = False
    forced: Forced | None = None
    record: Callable[..., None] | None = None
    observe: Callable[..., None] | None = None


_CURRENT: ContextVar[RoutingContext | None] = ContextVar("routing_context", default=None)


current_context: Callable[[], RoutingContext | None] = _CURRENT.get
"""The pass under way in this thread, if any."""


class routing_context:  # noqa: N801, a context manager that costs less than a generator at every token
    """Make ``context`` the current pass within the block."""

    def __init__(self, context: RoutingContext | None) -> None:
        self.context = context

    def __enter__(self) -> None:
        self.token = _CURRENT.set(self.context)

    def __exit__(self, *_: object) -> None:
        _CURRENT.reset(self.token)


class CarriesContext:
    """Mixin for a transformers model: gradient checkpointing runs its layers again under the pass that they ran in.

    That is in the backward pass, in another thread and after the model's own forward has ended.
    """

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, carrying(gradient_checkpointing_func), **kwargs)


def carrying(function: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointing function that hands on the pass in which it is called."""
    return functools.partial(_carried, function)


def carry(modules: Iterable[nn.Module], back: bool = False) -> None:
    """See to modules whose checkpointing was set before they were routed; ``back``: as it was."""
    for module in modules:
        function = vars(module).get("_gradient_checkpointing_func")
        ours = getattr(function, "func", None) is _carried
        if function is not None and ours == back:
            module._gradient_checkpointing_func = function.args[0] if back else carrying(function)


def _carried(function: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
    return function(functools.partial(_within, current_context(), run), *args)


def _within(context: RoutingContext | None, run: Callable[..., Any], *args: Any) -> Any:
    with routing_context(context):
        return run(*args)


def forced_decision(
    forced: Forced | None, layer: int, part: str, shape: torch.Size, past: int, device
) -> Tensor | None:
    """The imposed decision for one router as a bool tensor of ``shape`` (``[b]`` or ``[b, t]``), or None.

    A ``[b, T]`` tensor is read at the positions ``past … past+t`` of this pass, so that one mask serves a whole
    cached generation; a number of rows or tokens that does not fit is a ValueError.
    """
    if forced is None:
        return None
    if isinstance(forced, (dict, Mapping)):  # decoding asks at every token, and a plain dict is told at once
        value = forced.get((layer, part))
        value = forced.get(layer) if value is None else value
    else:
        value = forced(layer, part, shape, past) if callable(forced) else forced
    if value is None:
        return None
    if isinstance(value, bool):
        return torch.full(shape, value, dtype=torch.bool, device=device)
    if not isinstance(value, Tensor) or value.device != device:
        try:
            value = torch.as_tensor(value, device=device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"forced mask of layer {layer} must be bool, not a {type(value).__name__}") from None
    if value.dtype != torch.bool:
        raise ValueError(f"forced mask of layer {layer} must be bool, not {value.dtype}")
    given = value.shape
    if given == shape:
        return value
    if len(given) == len(shape) == 2 and given[0] == shape[0] and given[1] >= past + shape[1]:
        return value.narrow(1, past, shape[1])
    if len(given) == 0 or (len(given) == 1 < len(shape) and given[0] == shape[0]):
        return value.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    behind = f" behind {past} tokens" if past else ""
    raise ValueError(f"forced mask of layer {layer} has shape {tuple(given)}, the decision {tuple(shape)}{behind}")
