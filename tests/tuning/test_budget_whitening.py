"""Coordinates of unit covariance: what they are computed from, and that training really steps in them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_batch, tiny_model

from router_tuning.model import route, routed_modules
from router_tuning.model.router import ModRouter
from router_tuning.tuning.recipes.budget.whitening import inverse_roots, whitened


@pytest.fixture(params=["attn_token", "attn_token+mlp_token", "expert_token"])
def model(request):
    family = "mixtral" if request.param.startswith("expert") else "llama"
    return route(tiny_model(family, num_hidden_layers=4), mod_n=2, granularity=request.param).train()


def batches():
    pairs = [random_batch(rows=6, tokens=12), random_batch(rows=5, tokens=9)]
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs]


def test_what_routers_see_of_real_tokens_has_unit_covariance(model):
    thresholds = {name: module.mod_logit for name, module in routed_modules(model).items()}
    roots = inverse_roots(model, batches())
    assert model.training and thresholds == {name: m.mod_logit for name, m in routed_modules(model).items()}
    assert set(roots) == set(thresholds)
    for name, module in routed_modules(model).items():
        seen = []
        handle = module.mod_router.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
        model.eval()
        for batch in batches():
            with torch.no_grad():
                model(**batch, use_cache=False)
            seen[-1] = seen[-1].reshape(-1, seen[-1].shape[-1])[batch["attention_mask"].bool().flatten()]
        handle.remove()
        found = torch.cov((torch.cat(seen).double() @ roots[name].double()).T, correction=0)
        values = torch.linalg.eigvalsh(found)
        # Directions of hardly any variance are held back by the floor; none is larger than one.
        assert values.max() == pytest.approx(1, abs=1e-3) and (values > 0.99).sum() > len(values) / 2


def test_steps_are_those_of_the_whitened_weight(model):
    """Adam on ``V`` inside the block; ``W = V·A`` decides all along and is what the router holds afterwards."""
    roots = inverse_roots(model, batches())
    torch.manual_seed(0)
    routers = {name: module.mod_router for name, module in routed_modules(model).items()}
    for router in routers.values():
        torch.nn.init.normal_(router.weight, std=0.1)
    start = {name: router.weight.detach().clone() for name, router in routers.items()}
    apart = {n: torch.nn.Parameter(weight @ torch.linalg.inv(roots[n])) for n, weight in start.items()}
    alone = torch.optim.AdamW(list(apart.values()), lr=1e-2)
    hidden = torch.randn(20, next(iter(start.values())).shape[1])
    before = {name: router(hidden) for name, router in routers.items()}
    with whitened(model, roots):
        for name, router in routers.items():
            torch.testing.assert_close(router(hidden), before[name], atol=1e-4, rtol=1e-4)
        together = torch.optim.AdamW([router.weight for router in routers.values()], lr=1e-2)
        for step in range(4):
            hidden = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(step))
            for optimizer in (together, alone):
                optimizer.zero_grad()
            torch.stack([router(hidden).sigmoid().sum() for router in routers.values()]).sum().backward()
            whole = [hidden @ (weight @ roots[name]).T for name, weight in apart.items()]
            torch.stack([logits.sigmoid().sum() for logits in whole]).sum().backward()
            together.step()
            alone.step()
    for name, router in routers.items():
        expected = (apart[name] @ roots[name]).detach()
        assert type(router) is ModRouter and set(router.state_dict()) == {"weight"}
        assert torch.allclose(router.weight, expected, atol=1e-4) and not torch.allclose(
            expected, start[name], atol=1e-2
        )
