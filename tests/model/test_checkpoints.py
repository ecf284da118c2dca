"""Routed checkpoints: config and weights round trip, stock loading, router dtype, device maps and hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import LAYERS, routed_model
from transformers import AutoModelForCausalLM

from router_tuning.model import is_routed, route, routed_modules, unroute

# ---------------------------------------------------------------- dtype and devices


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_routers_stay_float32_when_the_model_is_cast(cast):
    model = cast(routed_model("llama", "attn_token+mlp_token"))
    dtypes = {("mod_router" in name): parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes[True] == torch.float32 and dtypes[False] != torch.float32


def test_routers_stay_float32_when_loaded_in_half_precision(tmp_path):
    model = routed_model("llama")
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16, "auto"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for name, parameter in again.named_parameters():
            if "mod_router" in name:
                assert torch.equal(parameter, model.get_parameter(name)), "bits must survive loading"
            elif dtype != "auto":
                assert parameter.dtype == dtype
    plain = tmp_path / "plain"
    unroute(model).to(torch.bfloat16).save_pretrained(plain)
    late = route(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16), mod_n=2)
    assert {p.dtype for n, p in late.named_parameters() if "mod_router" in n} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "granularity"),
    [("llama", "attn_sequence"), ("qwen3", "attn_token+mlp_token"), ("llama", "block_sequence")],
)
def test_device_map_and_accelerate_hooks_before_and_after_routing(family, granularity, tmp_path):
    from accelerate import cpu_offload, dispatch_model

    model = routed_model(family, granularity)
    ids, mask = random_batch(padding="left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    weights = [m.mod_router.weight.detach().clone() for m in routed_modules(model).values()]
    model.save_pretrained(tmp_path)

    def check(other):
        assert is_routed(other)
        with torch.no_grad():
            assert torch.equal(other(ids, attention_mask=mask).logits, expected)

    def set_weights(other):
        with torch.no_grad():
            for module, weight in zip(routed_modules(other).values(), weights, strict=True):
                module.mod_router.weight.copy_(weight)

    check(AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}))
    check(dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True))
    check(cpu_offload(copy.deepcopy(model), "cpu"))
    for hook in (lambda m: dispatch_model(m, {"": "cpu"}, force_hooks=True), lambda m: cpu_offload(m, "cpu")):
        dense = tiny_model(family)
        with torch.no_grad():
            plain = dense(ids).logits
        hook(dense)
        route(dense, mod_layers=LAYERS, granularity=granularity)
        set_weights(dense)
        check(dense)
        with torch.no_grad():
            assert torch.equal(unroute(dense)(ids).logits, plain)
