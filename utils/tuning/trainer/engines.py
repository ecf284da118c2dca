"""The engine that the launcher asked for is the one that runs, on GPUs and on CPUs; anything else is an error."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

from router_tuning.errors import UserError


def requested() -> str:
    """``deepspeed``, ``fsdp``, ``ddp`` or ``one process``, as the launcher's environment says."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "fsdp"
    return "ddp" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "one process"


def settings_without_gpu() -> dict[str, object]:
    """TrainingArguments that make several processes run together on a machine without a GPU; empty where there is one.

    accelerate starts CPU processes if it is told ``use_cpu``. DeepSpeed it would then drop without a word: that one
    finds the CPU by itself, and needs the name of the backend.
    """
    if torch.accelerator.is_available():
        return {}
    if requested() == "deepspeed":
        os.environ.pop("ACCELERATE_USE_CPU", None)
        return {"ddp_backend": "gloo"}
    return {"use_cpu": True}


def enable_fsdp_on_cpu(accelerator: Accelerator) -> bool:
    """Give accelerate's FSDP2 to CPU processes, for which it is not offered though torch has it; True if done."""
    if requested() != "fsdp" or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError("FSDP on CPUs is FSDP2: set fsdp_version: 2 in the accelerate config")
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    # Every new AcceleratorState takes its values from here.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return True


def check_engine(accelerator: Accelerator) -> None:
    """UserError if processes or engine are not those that were launched."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world:
        raise UserError(
            f"{world} processes were launched, {accelerator.num_processes} run together: check the config file"
        )
    running = {DistributedType.DEEPSPEED: "deepspeed", DistributedType.FSDP: "fsdp"}.get(accelerator.distributed_type)
    asked = requested()
    if asked in ("deepspeed", "fsdp") and running != asked:
        raise UserError(
            f"{asked} was asked for and {accelerator.distributed_type.value} would run: start it with accelerate "
            "launch or scripts/finetune_mod.sh, also for one process"
        )


def running(accelerator: Accelerator) -> str:
    """Name of the engine that runs, for the record: ``one process``, ``DDP``, ``FSDP2``, ``DeepSpeed ZeRO-3`` …"""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    return "one process" if accelerator.num_processes == 1 else "DDP"
