"""What a run learns, read from and written to any engine: DeepSpeed in its own format, all others in one.

Under FSDP2 parameters and optimizer moments are DTensors: they are gathered for the file and cut again on loading, so
that a run may continue on another number of processes. ZeRO keeps its moments in flat partitions that only DeepSpeed
reads back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"


def learnt(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a run adds to its base, all that trains and all of the routing, by name in the wrapped model."""
    named = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    routing = {name for name in named if "mod_" in name and "original_module" not in name}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad or name in routing}


def full_tensor(value: Tensor) -> Tensor:
    """The whole of a parameter on the CPU, whatever holds it in shards. Collective where it is sharded."""
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().cpu().clone()
    if isinstance(value, DTensor):
        device = value.device_mesh.device_type
        whole = value.detach() if value.device.type == device else value.detach().to(device)
        return whole.full_tensor().cpu()
    return value.detach().cpu().clone()


def placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole ``value`` as the engine holds ``parameter``: where that is cut, this rank's part of it."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a run learns, whole, on the CPU. Collective: every rank calls."""
    return {name: full_tensor(parameter).contiguous() for name, parameter in learnt(model).items()}


def gather_optimizer(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Moments and settings by parameter name, on the first process. Collective: every rank calls."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), options=options)


@torch.no_grad()
def load_weights(model: nn.Module, file: Path, frozen_only: bool = False) -> None:
    """Inverse of :func:`gather_weights`; every rank reads the file and keeps its own part.

    Args:
        frozen_only: leave out what trains, which an engine has restored by itself.
    """
    saved, parameters = load_file(file), learnt(model)
    if set(saved) != set(parameters):
        odd = sorted(set(saved) ^ set(parameters))
        raise ValueError(f"{file} holds other parameters than those that train: {', '.join(odd[:4])}")
    for name, parameter in parameters.items():
        if frozen_only and parameter.requires_grad:
            continue
        parameter.copy_(placed(saved[name], parameter))


def load_optimizer(model: nn.Module, optimizer: Any, file: Path) -> None:
    """Inverse of :func:`gather_optimizer`."""
    saved, options = torch.load(file, map_location="cpu", weights_only=True), StateDictOptions(full_state_dict=True)
    inner = getattr(optimizer, "optimizer", optimizer)
    set_optimizer_state_dict(model, inner, optim_state_dict=saved, options=options)
