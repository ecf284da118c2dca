"""The fitted policy finds what a made-up problem rewards, and folding keeps its decisions."""

from __future__ import annotations

import pytest
import torch

from router_tuning.tuning.recipes.budget.policy import FitSettings, fit
from router_tuning.tuning.recipes.budget.search import Explored, all_masks, sample_masks


def problem(inputs=400, routers=3, width=6, listed=True, seed=0):
    """Half of the inputs (feature 0 above its mean) need every layer, the others none; all features are shifted."""
    generator = torch.Generator().manual_seed(seed)
    needy = torch.rand(inputs, generator=generator) < 0.5
    if listed:
        masks, log_q = all_masks(routers)[None], torch.zeros(1, 2**routers)
        states = [torch.arange(2**routers) >> (routers - r - 1) for r in range(routers)]
        widths = [2 ** (r + 1) for r in range(routers)]
    else:
        masks, log_q = sample_masks(inputs, 12, routers, generator)
        states, widths = [torch.arange(12)] * routers, [12] * routers
    features = []
    for count in widths:
        feature = torch.randn(inputs, 1, width, generator=generator).repeat(1, count, 1) * 0.5 + 3.0
        feature[..., 0] += needy.float()[:, None] * 4
        features.append(feature.half())
    lost = (~masks).float().sum(-1)
    likelihood = -0.5 * lost * needy.float()[:, None] - 0.01
    exact = likelihood > -0.1
    return needy, Explored(features, states, masks, log_q, likelihood.expand(inputs, -1), exact)


@pytest.mark.parametrize("listed", [True, False])
def test_depth_goes_to_the_inputs_that_need_it(listed):
    needy, explored = problem(listed=listed)
    policy = fit(explored, [0.25, 0.5, 0.75], FitSettings(steps=150, batch=400))
    place = policy.budgets.index(0.5)
    for r, feature in enumerate(explored.features):
        keep = feature[:, 0].float() @ policy.weight[r] >= policy.logit[r, place]
        assert (keep == needy).float().mean() > 0.97


def test_capacity_follows_the_budget():
    _, explored = problem()
    policy = fit(explored, [0.2, 0.5, 0.8], FitSettings(steps=150, batch=400))
    shares = []
    for place in range(3):
        kept = [
            (f[:, 0].float() @ policy.weight[r] >= policy.logit[r, place]).float().mean()
            for r, f in enumerate(explored.features)
        ]
        shares.append(float(torch.stack(kept).mean()))
    assert shares[0] < shares[1] < shares[2]
    assert abs(shares[1] - 0.5) < 0.1


def test_same_seed_same_policy():
    _, explored = problem()
    first, second = (fit(explored, [0.5], FitSettings(steps=20)) for _ in range(2))
    assert torch.equal(first.weight, second.weight) and torch.equal(first.logit, second.logit)
