"""The plan of a run, printed before anything is loaded: parameters, memory per GPU, steps."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from router_tuning.errors import UserError
from router_tuning.tuning.command_line import Command
from router_tuning.tuning.memory import StepMemory, simulate_step
from router_tuning.tuning.run import steps_of
from router_tuning.tuning.tuning_data import check_file
from router_tuning.tuning.tuning_model import dense_config, locate_base, routing_of

ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload", "FSDP2")
WORLDS = (1, 4, 8)


def dry_run(command: Command) -> str:
    """The plan as text; needs the base's ``config.json`` alone. UserError for a routing that does not fit."""
    base = locate_base(command.model, weights=False)
    config = dense_config(base, command.model)
    routing, training = command.routing, command.training
    routed = routing_of(config, routing)
    batch, tokens = training.per_device_train_batch_size, command.data.max_seq_length
    memory = simulate_step(
        config,
        routing,
        getattr(torch, command.model.dtype),
        batch,
        tokens,
        autocast=training.bf16,
        checkpointing=bool(training.activation_checkpointing),
    )
    layers = routed.mod_layers or f"the deepest {routed.mod_n} of {config.num_hidden_layers} but the last"
    lines = [
        f"base         {command.model.name}: {memory.parameters / 1e9:.3f} B parameters in {command.model.dtype}",
        f"routing      {routing.granularity} on {layers}",
        f"trains       {routing.trains}: {memory.trainable:,} parameters ({memory.trainable / memory.parameters:.2e})",
        f"steps        {_steps(command)}",
        f"micro-batch  {batch} sequences of at most {tokens} tokens",
        "",
        *_table(memory, _worlds(command)),
        "",
        "GB per GPU at the longest micro-batch, 1 GB of it for CUDA and communication; shorter rows need less.",
    ]
    asked = engine_of(training.accelerate_config)
    if asked and training.num_processes:
        total = memory.per_process(asked, training.num_processes)["total"]
        lines.append(f"chosen: {asked} on {training.num_processes} process(es), {total / 1e9:.1f} GB each")
    return "\n".join(lines)


def _worlds(command: Command) -> list[int]:
    asked = command.training.num_processes
    return sorted({*WORLDS, asked} if asked else set(WORLDS))


def _steps(command: Command) -> str:
    data, training = command.data, command.training
    try:
        rows, known = check_file(data.path, data.max_train_samples).rows, f"rows of {data.path}"
    except UserError:
        if not data.max_train_samples:
            return f"unknown: {data.path} is not there"
        rows, known = data.max_train_samples, f"rows ({data.path} is not there yet)"
    try:
        return f"{steps_of(training, rows)} of {training.global_batch_size} sequences, from {rows:,} {known}"
    except UserError as error:
        return f"none: {error}"


def _table(memory: StepMemory, worlds: list[int]) -> list[str]:
    parts = ("weights", "gradients", "optimizer", "activations", "total")
    lines = [f"{'GPUs':>4}  {'engine':<15}" + "".join(f"{part:>13}" for part in parts)]
    for world in worlds:
        for engine in ENGINES:
            if world == 1 and engine not in ("DDP", "ZeRO-3 offload"):
                continue
            shown = memory.per_process(engine, world)
            name = "one process" if engine == "DDP" and world == 1 else engine
            lines.append(f"{world:>4}  {name:<15}" + "".join(f"{shown[part] / 1e9:>13.2f}" for part in parts))
    return lines


def engine_of(config: str | None) -> str | None:
    """The engine that an accelerate config names, by its file name and content."""
    if config is None:
        return None
    text = Path(config).read_text()
    stage = re.search(r"zero(\d)(_offload)?\.json", text)
    if stage:
        return f"ZeRO-{stage[1]}" + (" offload" if stage[2] else "")
    return "FSDP2" if re.search(r"distributed_type:\s*FSDP", text) else "DDP"
