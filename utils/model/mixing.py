"""One factory for all routed classes: a mixin in front of the class that an object has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from types import MethodType
from typing import Any

from torch import nn

_CLASSES: dict[tuple[type, type], type] = {}
_REPLACED: ContextVar[frozenset[int]] = ContextVar("replaced", default=frozenset())


def mixed(mixin: type, plain: type) -> type:
    """The class of a ``plain`` object with ``mixin`` in front, made once.

    It keeps the names of ``plain``, so that wrapping policies still find it, but for what ``mixin.mod_names(plain)``
    changes. Objects of it are pickled and copied by the two classes, since no module holds it under its name.
    """
    if (mixin, plain) not in _CLASSES:
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        names |= {"mod_mixture": (mixin, plain), "__reduce_ex__": _reduce}
        names |= mixin.mod_names(plain) if hasattr(mixin, "mod_names") else {}
        bases: tuple[type, ...] = (mixin, plain)
        if hasattr(mixin, "forward"):
            names["forward"], bases = _forward_of(mixin, plain), (mixin, _Inner, plain)
        cls = type(names.pop("__name__", plain.__name__), bases, names)
        if hasattr(mixin, "forward"):
            cls.forward = _Forward(cls.forward)
        _CLASSES.setdefault((mixin, plain), cls)
    return _CLASSES[mixin, plain]


def mix_in(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` in front of the class of ``module``."""
    _become(module, mixed(mixin, type(module)))


def mix_out(module: nn.Module) -> None:
    """Undo :func:`mix_in`."""
    _become(module, module.mod_mixture[1])


def _become(module: nn.Module, cls: type) -> None:
    """Change the class of a module; what an instance has in place of its class's forward stays where it belongs.

    That is accelerate's hook, outermost, which calls ``_old_forward``, and any other forward, innermost.
    """
    fields, old = vars(module), type(module)
    slot = "_old_forward" if "_hf_hook" in fields else "forward"
    patch = fields.pop("mod_patch", None) or fields.pop(slot, None)
    if getattr(patch, "__func__", None) is old.forward:
        patch = None
    module.__class__ = cls
    routes = isinstance(vars(cls).get("forward"), _Forward)
    if patch is not None:
        fields["mod_patch" if routes else slot] = patch
    if slot == "_old_forward" and (routes or patch is None):
        fields[slot] = MethodType(cls.forward, module)


class _Forward:
    """The forward of a routed class, which a forward put on one of its instances does not hide.

    Libraries replace a module's forward by a faster one, or wrap it: what they put there is run in place of the plain
    class's, so routing stays around it, whether it was there before the module was routed or came later.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Callable[..., Any]:
        if module is None:
            return self.function
        fields = module.__dict__
        if "forward" in fields:
            if "_hf_hook" in fields:  # it moves inputs and weights to their device before anything may look at them
                return fields["forward"]
            self.__set__(module, fields["forward"])  # written to the dictionary, past the line below
        return MethodType(self.function, module)

    def __set__(self, module: nn.Module, value: Callable[..., Any]) -> None:
        fields = module.__dict__
        if "_hf_hook" in fields:
            fields["forward"] = value
            return
        fields.pop("forward", None)
        if getattr(value, "__func__", None) is not self.function:
            fields["mod_patch"] = value

    def __delete__(self, module: nn.Module) -> None:
        if module.__dict__.pop("forward", None) is None and module.__dict__.pop("mod_patch", None) is None:
            raise AttributeError("forward")


class _Inner:
    """Between a mixin and the plain class: what the mixin calls as ``super().forward``."""

    def forward(self, *args, **kwargs):
        patch = self.__dict__.get("mod_patch")
        if patch is None:
            return super().forward(*args, **kwargs)
        token = _REPLACED.set(_REPLACED.get() | {id(self)})
        try:
            return patch(*args, **kwargs)
        finally:
            _REPLACED.reset(token)


def _forward_of(mixin: type, plain: type) -> Callable[..., Any]:
    """The mixin's forward with the signature of the plain one; the plain one for a patch that calls what it wraps."""

    @functools.wraps(plain.forward)
    def forward(self, *args, **kwargs):
        if not isinstance(self, mixin):  # a patch that came after the mixin, and outlived it
            return plain.forward(self, *args, **kwargs)
        if "mod_patch" in self.__dict__ and id(self) in _REPLACED.get():
            return super(_Inner, self).forward(*args, **kwargs)
        return mixin.forward(self, *args, **kwargs)

    return forward


def _reduce(self: Any, protocol: int) -> tuple:
    return (_blank, self.mod_mixture, *object.__reduce_ex__(self, max(protocol, 2))[2:])


def _blank(mixin: type, plain: type) -> Any:
    cls = mixed(mixin, plain)
    return cls.__new__(cls)
