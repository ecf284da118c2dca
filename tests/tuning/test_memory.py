"""Predicted memory against what torch's own allocator hands out in a real step of the same model."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from router_tuning.model import record_routing, route
from router_tuning.tuning.command.arguments import RoutingArguments
from router_tuning.tuning.dry_run import StepMemory, simulate_step
from router_tuning.tuning.tuning_model import mark_trainable, routing_of

BATCH, TOKENS = 4, 128
# Large enough for activations to count, small enough for a step in a tenth of a second.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512, "max_position_embeddings": 512}


def config_of(family: str):
    return AutoConfig.for_model(family, **{**tiny_models.COMMON, **tiny_models.FAMILIES[family], **SIZES})


def measured(config, routing: RoutingArguments, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes at the peak of a step that has the optimizer's state: what lies there before, and allocations in it."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    route(model, **{name: value for name, value in vars(routing_of(config, routing)).items() if value is not None})
    model = mark_trainable(model, routing).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    inputs = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask = torch.ones_like(inputs)
    mask[0, -20:] = 0  # as in training, rows differ in length

    def step() -> None:
        with record_routing(model) as log:
            loss = model(input_ids=inputs, attention_mask=mask, labels=inputs).loss + log.penalty(0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    before = sum(held.values()) + sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak > before / 10, "activations matter here, or this shows little"
    return before + peak


@pytest.mark.parametrize(
    ("family", "settings", "checkpointing"),
    [
        ("llama", {}, False),
        ("llama", {}, True),
        ("llama", {"lora": True, "lora_r": 4}, False),
        ("llama", {"router_only": False}, False),
        ("mistral", {"granularity": "attn_token"}, False),
        ("qwen2", {"granularity": "block_sequence"}, False),
        ("gemma2", {"granularity": "mlp_token"}, True),
        ("mixtral", {"granularity": "expert_token"}, False),
    ],
)
def test_predicted_is_measured_within_15_percent(family, settings, checkpointing):
    config, routing = config_of(family), RoutingArguments(mod_n=3, **settings)
    real = measured(config, routing, torch.float32, checkpointing)
    step = simulate_step(config, routing, torch.float32, BATCH, TOKENS, checkpointing=checkpointing)
    predicted = step.weights + step.gradients + step.optimizer + step.activations
    assert predicted == pytest.approx(real, rel=0.15)


def test_half_precision_halves_the_base():
    config, routing = config_of("llama"), RoutingArguments(mod_n=3)
    single, half = (simulate_step(config, routing, dtype, BATCH, TOKENS) for dtype in (torch.float32, torch.bfloat16))
    routers = single.gradients  # float32 in both
    assert half.weights - routers == pytest.approx((single.weights - routers) / 2, rel=0.01)
    assert half.gradients == single.gradients and half.parameters == single.parameters


def test_nothing_is_kept_below_the_first_routed_layer():
    config = config_of("llama")
    one, three = (simulate_step(config, RoutingArguments(mod_n=n), torch.float32, BATCH, TOKENS) for n in (1, 3))
    all_of_it = simulate_step(config, RoutingArguments(mod_n=3, router_only=False), torch.float32, BATCH, TOKENS)
    assert one.activations < three.activations < all_of_it.activations
    assert one.gradients == 128 * 4 and three.optimizer < 3 * 128 * 4 * 2 + 100
    assert all_of_it.gradients == all_of_it.parameters * 4


def test_shards_shrink_with_the_number_of_processes():
    step = StepMemory(
        parameters=10**9,
        trainable=10**9,
        weights=4 * 10**9,
        gradients=4 * 10**9,
        optimizer=8 * 10**9,
        activations=10**9,
        largest_unit=10**8,
    )

    def of(engine: str, world: int, part: str) -> float:
        return step.per_process(engine, world)[part]

    assert of("DDP", 8, "weights") == of("ZeRO-2", 8, "weights") == 4 * 10**9
    assert of("DDP", 8, "optimizer") == 8 * 10**9 and of("ZeRO-1", 8, "optimizer") == 10**9
    assert of("ZeRO-1", 8, "gradients") == 8 * 10**9 and of("ZeRO-2", 8, "gradients") == 5 * 10**8
    assert of("FSDP2", 8, "weights") == of("ZeRO-3", 8, "weights") == 5 * 10**8 + 2 * 10**8
    assert of("ZeRO-3 offload", 8, "weights") == 2 * 10**8 and of("ZeRO-3 offload", 1, "optimizer") == 0
