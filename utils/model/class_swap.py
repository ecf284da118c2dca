"""One factory for all routed classes: a mixin in front of the class that an object has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
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
        _CLASSES.setdefault((mixin, plain), type(names.pop("__name__", plain.__name__), bases, names))
    return _CLASSES[mixin, plain]


def plain_class(instance: Any) -> type:
    """The class of ``instance`` without the mixin in front of it, if there is one."""
    return getattr(type(instance), "mod_mixture", (None, type(instance)))[1]


def mix_in(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` in front of the class of ``module``."""
    _become(module, mixed(mixin, type(module)))


def mix_out(module: nn.Module) -> None:
    """Undo :func:`mix_in`, and forget what routing noted on ``module``."""
    _become(module, module.mod_mixture[1])
    for name in [name for name in vars(module) if name.startswith("mod_")]:
        delattr(module, name)


def claim_forwards(modules: Iterable[nn.Module]) -> None:
    """See to forwards that were written into the dictionary of a routed module, past :meth:`_Inner.__setattr__`."""
    for module in () if torch.compiler.is_compiling() else modules:
        if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
            module.forward = module.__dict__.pop("forward")


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
    if patch is not None:
        fields["mod_patch" if issubclass(cls, _Inner) else slot] = patch
    if slot == "_old_forward" and slot not in fields:
        fields[slot] = MethodType(cls.forward, module)


class _Inner:
    """Between a mixin and the plain class: what the mixin calls as ``super().forward``.

    A forward that is put on an instance would hide that of its class, and with it the routing. Libraries do that to
    replace it by a faster one, or to wrap it. Here it takes the place of the plain class's forward instead, so routing
    stays around it, whether it was there before the module was routed or came later.
    """

    def forward(self, *args, **kwargs):
        patch = self.__dict__.get("mod_patch")
        if patch is None:
            return super().forward(*args, **kwargs)
        token = _REPLACED.set(_REPLACED.get() | {id(self)})
        try:
            return patch(*args, **kwargs)
        finally:
            _REPLACED.reset(token)

    def __setattr__(self, name: str, value: Any) -> None:
        # accelerate's hook moves inputs and weights to their device before anything may look at them
        if name != "forward" or "_hf_hook" in self.__dict__:
            super().__setattr__(name, value)
            return
        self.__dict__.pop("forward", None)
        if getattr(value, "__func__", None) is not type(self).forward:
            self.__dict__["mod_patch"] = value

    def __delattr__(self, name: str) -> None:
        super().__delattr__("mod_patch" if name == "forward" and "mod_patch" in self.__dict__ else name)


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
