"""What trains, read from and written to any engine: one process, DDP and FSDP2 share a format; DeepSpeed has its own.

Under FSDP2 parameters and optimizer moments are DTensors: they are gathered one by one for the file and cut again on
loading, so that a run may continue on another number of processes. ZeRO keeps its moments in flat partitions that only
DeepSpeed reads back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

WEIGHTS = "trainable.safetensors"
OPTIMIZER = "optimizer.pt"


def learnt(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a run adds to its base, all that trains and the skip paths, by name in the wrapped model."""
    named = ((name.removeprefix("module."), parameter) for name, parameter in model.named_parameters())
    return {name: parameter for name, parameter in named if parameter.requires_grad or "mod_skip" in name}


def full_tensor(value: Tensor) -> Tensor:
    """The whole of a parameter or moment on the CPU, whatever holds it in shards. Collective where it is sharded."""
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().cpu().clone()
    if isinstance(value, DTensor):
        device = value.device_mesh.device_type
        whole = value.detach() if value.device.type == device else value.detach().to(device)
        return whole.full_tensor().cpu()
    return value.detach().cpu().clone()


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a run learns, whole, on the CPU. Collective: every rank calls."""
    return {name: full_tensor(parameter).contiguous() for name, parameter in learnt(model).items()}


def gather_optimizer(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Moments by parameter name, and the settings of the groups. Collective: every rank calls."""
    inner = getattr(optimizer, "optimizer", optimizer)
    names = {id(parameter): name for name, parameter in learnt(model).items()}
    state = {}
    for group in inner.param_groups:
        for parameter in group["params"]:
            values = inner.state.get(parameter, {})
            state[names[id(parameter)]] = {
                key: full_tensor(value) if isinstance(value, Tensor) else value for key, value in values.items()
            }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
    return {"state": state, "groups": groups}


@torch.no_grad()
def load_weights(model: nn.Module, file: Path, among: str = "") -> None:
    """Inverse of :func:`gather_weights`; every rank reads the file and keeps its own part.

    Args:
        among: load only weights with this in their names.
    """
    saved = load_file(file)
    parameters = learnt(model)
    if set(saved) != set(parameters):
        odd = sorted(set(saved) ^ set(parameters))
        raise ValueError(f"{file} holds other parameters than those that train: {', '.join(odd[:4])}")
    for name, parameter in parameters.items():
        if among in name:
            parameter.copy_(_like(saved[name], parameter))


def load_optimizer(model: nn.Module, optimizer: Any, file: Path) -> None:
    """Inverse of :func:`gather_optimizer`."""
    saved = torch.load(file, map_location="cpu", weights_only=True)
    inner = getattr(optimizer, "optimizer", optimizer)
    names = {id(parameter): name for name, parameter in learnt(model).items()}
    for group, values in zip(inner.param_groups, saved["groups"], strict=True):
        group.update(values)
        for parameter in group["params"]:
            # A step count is a scalar; fused kernels want it where the parameter is, the others on the CPU.
            inner.state[parameter] = {
                key: _like(value, parameter)
                if isinstance(value, Tensor) and value.dim()
                else _scalar(value, group, parameter)
                for key, value in saved["state"][names[id(parameter)]].items()
            }


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        local = value.to(parameter.device_mesh.device_type)
        cut = distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return cut if cut.device == parameter.device else cut.to(parameter.device)
    return value.to(parameter.device)


def _scalar(value: Any, group: dict[str, Any], parameter: Tensor) -> Any:
    if isinstance(value, Tensor) and (group.get("fused") or group.get("capturable")):
        return value.to(parameter.device)
    return value
