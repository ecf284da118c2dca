"""The plan of a run, printed before anything is loaded: parameters, memory per GPU, steps.

The routed model of the run is built and stepped twice under ``FakeTensorMode``: every operation computes shapes and
types and no value, and the bytes that would be alive are counted. So the memory told knows the architecture, what is
routed, what trains and what autograd keeps, without a formula that could age.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from router_tuning.bases.description import dense_config
from router_tuning.errors import UserError
from router_tuning.model import record_routing, route
from router_tuning.model.modules import decoder_of
from router_tuning.tuning.command.arguments import RoutingArguments
from router_tuning.tuning.command.command_line import Command
from router_tuning.tuning.run import steps_of
from router_tuning.tuning.tuning_data import check_file
from router_tuning.tuning.tuning_model import locate_base, mark_trainable, routing_of

ENGINES = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3, "ZeRO-3 offload": 3, "FSDP2": 3}
"""Engine → how much of the optimizer (1), the gradients (2) and the weights (3) it spreads over processes."""
OVERHEAD = 1.0e9
"""CUDA context, communication buffers and fragmentation of one GPU, bytes; seen between 0.6 and 1.5 GB."""
_GROUPED = torch.ops.aten._grouped_mm.default


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process that holds everything: ``activations`` is what the peak adds to the rest."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    largest_unit: int

    def per_process(self, engine: str, world: int) -> dict[str, float]:
        """Bytes of each of so many processes under one of :data:`ENGINES`."""
        stage, offload = ENGINES[engine], engine.endswith("offload")
        weights: float = self.weights
        if offload or (stage == 3 and world > 1):
            # A sharded layer is whole while it computes, and the next one is fetched meanwhile.
            whole = min(self.weights, 2 * self.largest_unit)
            weights = whole if offload else self.weights / world + whole
        # DDP and ZeRO-1 keep gradients and the buckets in which they travel.
        gradients = self.gradients / world if stage >= 2 else self.gradients * (2 if world > 1 else 1)
        optimizer = 0 if offload else self.optimizer / world if stage >= 1 else self.optimizer
        parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": self.activations}
        return {**parts, "total": sum(parts.values()) + OVERHEAD}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def watch(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is _GROUPED:  # of experts; its shape function knows bfloat16 alone, its kernels float32, too
            result = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **(kwargs or {})).to(args[0].dtype)
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return result


def simulate_step(
    config: PretrainedConfig,
    routing: RoutingArguments,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    autocast: bool = False,
    checkpointing: bool = False,
) -> StepMemory:
    """Memory of training steps on ``batch`` sequences of ``tokens`` tokens, in one process.

    Raises:
        UserError: for a base that cannot be routed so.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        route(base, **{k: v for k, v in vars(routing_of(config, routing)).items() if v is not None})
        model = mark_trainable(base, routing).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # whose kernels autograd and attention then choose
        base.tie_weights()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        inputs = torch.zeros(batch, tokens, dtype=torch.long)
        with LiveBytes() as counter:
            for tensor in [*model.parameters(), *model.buffers()]:
                counter.watch(tensor)
            weights = counter.live
            # The second step has the optimizer's state, as all later ones do.
            for _ in range(2):
                counter.peak = counter.live
                _step(model, optimizer, inputs, autocast)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        held = {"weights": weights, "gradients": _bytes(trained), "optimizer": _bytes(moments)}
    return StepMemory(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in trained),
        **held,
        activations=max(0, counter.peak - sum(held.values())),
        # What a sharding engine gathers at once.
        largest_unit=max(
            _bytes(list(part.parameters()))
            for part in (*decoder_of(base).layers, base.get_input_embeddings(), base.get_output_embeddings())
        ),
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, autocast: bool) -> None:
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context, record_routing(model) as log:
        loss = model(input_ids=inputs, labels=inputs).loss + log.penalty(0.5)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- the plan


def dry_run(command: Command) -> str:
    """The plan as text; needs the base's ``config.json`` alone. UserError for a routing that does not fit."""
    base = locate_base(command.model, weights=False)
    config = dense_config(base, command.model.trust_remote_code)
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
        *_table(memory, sorted({1, 4, 8, training.num_processes or 1})),
        "",
        "GB per GPU at the longest micro-batch, 1 GB of it for CUDA and communication; shorter rows need less.",
    ]
    return "\n".join(lines)


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
