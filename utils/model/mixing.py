"""Changing the class of a live module: a mixin in front of its own class, names and accelerate's hooks kept."""

from __future__ import annotations

import sys

from torch import nn

_CLASSES: dict[tuple[type, type], type] = {}


def mix_in(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` in front of the class of ``module``; names stay, so wrapping policies still find the class."""
    plain = type(module)
    if (mixin, plain) not in _CLASSES:
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "mod_plain_class": plain}
        _CLASSES[mixin, plain] = type(plain.__name__, (mixin, plain), names)
    swap_class(module, _CLASSES[mixin, plain])


def mix_out(module: nn.Module) -> None:
    """Undo :func:`mix_in`."""
    swap_class(module, module.mod_plain_class)


def swap_class(module: nn.Module, cls: type) -> None:
    """Make ``module`` an instance of ``cls``."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        module.__class__ = cls
        return
    # accelerate's hooks bind the forward of the class they were added to (device_map): take them off and on again.
    # Whoever put a hook there has imported accelerate; this file itself must load where it is not installed.
    hooks = sys.modules["accelerate.hooks"]
    hooks.remove_hook_from_module(module)
    vars(module).pop("forward", None)  # what it put back is the forward of the class that the module leaves
    module.__class__ = cls
    hooks.add_hook_to_module(module, hook)


def check_forward(module: nn.Module) -> None:
    """ValueError if a forward of the instance's own would hide that of its class."""
    if "forward" in vars(module) and getattr(module, "_hf_hook", None) is None:
        raise ValueError(
            f"the forward of this {type(module).__name__} was replaced (by a patch, or by mixed precision): "
            "route before that, or unwrap the model first"
        )
