"""Memory of a training step before any weight is loaded: the step itself is run on tensors without storage.

The routed model of the run is built and stepped twice under ``FakeTensorMode``: every operation computes shapes and
types and no value, and the bytes that would be alive are counted. So the estimate knows the architecture, what is
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

from router_tuning.model import record_routing, route
from router_tuning.model.modules import decoder_of
from router_tuning.tuning.arguments import RoutingArguments
from router_tuning.tuning.tuning_model import mark_trainable, routing_of

OVERHEAD = 1.0e9
"""CUDA context, communication buffers and fragmentation of one GPU, bytes; seen between 0.6 and 1.5 GB."""


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
        """Bytes per process: ``DDP``, ``ZeRO-1``, ``ZeRO-2``, ``ZeRO-3``, ``ZeRO-3 offload`` or ``FSDP2``."""
        stage = {"ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3, "ZeRO-3 offload": 3, "FSDP2": 3}.get(engine, 0)
        offload = engine.endswith("offload")
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


_GROUPED = torch.ops.aten._grouped_mm.default


def _grouped_matmul(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Experts' product, whose shape function knows bfloat16 alone though its kernels know float32 too."""
    return _GROUPED(left.bfloat16(), right.bfloat16(), *args, **kwargs).to(left.dtype)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def watch(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            size = storage.nbytes()
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = _grouped_matmul(*args, **(kwargs or {})) if func is _GROUPED else func(*args, **(kwargs or {}))
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
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        route(model, **{k: v for k, v in vars(routing_of(config, routing)).items() if v is not None})
        unit = largest_unit(model)
        model = mark_trainable(model, routing).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_cpu(model)
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
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    moments = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return StepMemory(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in trained),
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        activations=max(0, counter.peak - weights - gradients - moments),
        largest_unit=unit,
    )


def move_to_cpu(model: nn.Module) -> None:
    """Give a model on the meta device empty tensors on the CPU, whose kernels autograd and attention then choose."""
    moved: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:  # tied weights stay one
            new = torch.empty_like(tensor, device="cpu")
            moved[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return moved[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: empty(tensor) for name, tensor in held.items() if tensor is not None})


def largest_unit(model: nn.Module) -> int:
    """Bytes of the largest part that a sharding engine gathers at once: a decoder layer, the embedding or the head."""
    parts = [*decoder_of(model).layers, model.get_input_embeddings(), model.get_output_embeddings()]
    return max(sum(p.numel() * p.element_size() for p in part.parameters()) for part in parts if part is not None)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, autocast: bool) -> None:
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context, record_routing(model) as log:
        loss = model(input_ids=inputs, labels=inputs).loss + log.penalty(0.5)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
