"""A forward or hook that another library puts on a module runs inside the routing, whichever of the two came first."""

import copy
import inspect
import types

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from tiny_models import logits_of, tiny_model
from tiny_routed import LAYERS, routed_model, split_inputs

from router_tuning.model import record_routing, route, routed_modules, unroute

PLACES = {"attn_token": "self_attn", "mlp_sequence": "mlp", "block_token": ""}


def replace(module, _, plain):
    """As ``module.forward = …`` of a faster kernel: nothing of the old forward is called."""
    module.forward = types.MethodType(plain, module)


def replace_in_dictionary(module, _, plain):
    module.__dict__["forward"] = types.MethodType(plain, module)


def wrap(module, before, _):
    """As autocast: the old forward is called, wherever it was taken from."""
    module.forward = before


def counted(function, ran):
    def forward(*args, **kwargs):
        ran.append(1)
        return function(*args, **kwargs)

    return forward


@pytest.mark.parametrize("first", ["patch", "route"])
@pytest.mark.parametrize(
    ("patch", "granularity", "where"),
    [
        *[(patch, place, "module") for patch in (replace, replace_in_dictionary, wrap) for place in PLACES],
        *[(patch, "attn_token", where) for patch in (replace, wrap) for where in ("decoder", "model")],
    ],
)
def test_a_patched_forward_runs_inside_the_routing(patch, granularity, first, where):
    expected_model, model, ran = routed_model("llama", granularity), tiny_model(), []
    place = f"model.layers.2.{PLACES[granularity]}".rstrip(".")
    plain = model.get_submodule({"module": place, "decoder": "model", "model": ""}[where])

    def apply():
        patch(plain, counted(plain.forward, ran), own)

    own = counted(type(plain).forward, ran)
    if first == "patch":
        apply()
    route(model, mod_layers=LAYERS, granularity=granularity)
    if first == "route":
        apply()
    split_inputs(model)
    ran.clear()
    with record_routing(model) as log, record_routing(expected_model) as expected_log:
        assert torch.equal(logits_of(model), logits_of(expected_model))
    assert log.capacity() == expected_log.capacity() and ran == [1]
    logits_of(unroute(model))
    assert ran == [1, 1], "and stays where it was"
    assert [m for m in model.modules() if "mod_patch" in vars(m)] == []


def test_any_attribute_may_be_asked_for_on_any_module():
    model, dense = routed_model("llama", "attn_token+mlp_token"), tiny_model()
    for module in model.modules():
        inspect.getmembers(module)
    for name, plain in dense.named_modules():
        module = model.get_submodule(name)
        for attribute in ("_gradient_checkpointing_func", "forward", "weight"):
            assert hasattr(module, attribute) == hasattr(plain, attribute), (name, attribute)
    assert inspect.signature(model.forward) == inspect.signature(dense.forward)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token+mlp_token", "block_sequence"])
def test_hooks_of_accelerate_serve_before_and_after_routing(granularity):
    model, dense = routed_model(granularity=granularity), tiny_model()
    expected, plain = logits_of(model), logits_of(dense)
    for hook in (lambda m: dispatch_model(m, {"": "cpu"}, force_hooks=True), lambda m: cpu_offload(m, "cpu")):
        assert torch.equal(logits_of(hook(copy.deepcopy(model))), expected)
        late = copy.deepcopy(dense)
        hook(late)
        route(late, mod_layers=LAYERS, granularity=granularity)
        for module, ours in zip(routed_modules(late).values(), routed_modules(model).values(), strict=True):
            module.mod_router.weight.copy_(ours.mod_router.weight)
        assert torch.equal(logits_of(late), expected) and torch.equal(logits_of(unroute(late)), plain)
