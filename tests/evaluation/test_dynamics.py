"""Known distributions have known entropies; the oracle equals brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from router_tuning.evaluation.dynamics import dynamics
from router_tuning.experiments.oracle import allocation_oracle, at_budget, static_curve
from router_tuning.tuning.recipes.budget.search import all_masks


def test_a_static_policy_has_no_entropy():
    found = dynamics({"a": [[1, 0]] * 5, "b": [[1, 0]] * 3})
    assert found["mask_entropy"] == 0 and found["task_information"] == 0 and found["masks"] == 1
    assert found["most_common"] == 1


def test_a_policy_that_follows_the_task_tells_all_about_it():
    found = dynamics({"a": [[1, 1]] * 8, "b": [[0, 1]] * 8})
    assert found["mask_entropy"] == pytest.approx(1) and found["task_information"] == pytest.approx(1)
    assert [r["entropy"] for r in found["routers"]] == pytest.approx([1, 0])
    assert found["kept_by_task"]["b"] == [0, 1]


def test_a_policy_that_ignores_the_task_tells_nothing():
    found = dynamics({task: [[0], [1]] * 4 for task in "ab"})
    assert found["mask_entropy"] == pytest.approx(1) and found["task_information"] == pytest.approx(0)


def test_no_decisions_are_refused():
    with pytest.raises(ValueError, match="sequence-level"):
        dynamics({"a": []})


@pytest.mark.parametrize("budget", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_allocation_oracle_equals_brute_force(budget):
    masks = all_masks(3)
    scores = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    kept = masks.sum(1)
    best = max(
        sum(float(scores[t, k]) for t, k in enumerate(choice)) / 3
        for choice in product(range(8), repeat=3)
        if sum(int(kept[k]) for k in choice) <= budget * 9 + 1e-9
    )
    assert allocation_oracle(scores, masks, budget) == pytest.approx(best, abs=1e-6)


def test_static_curve_is_chosen_by_one_set_and_scored_on_another():
    masks = all_masks(2)
    scores = torch.tensor([[0.1, 0.2, 0.6, 0.9]])
    curve = static_curve(scores, masks, torch.tensor([0.0, 5.0, 1.0, 9.0]))
    assert curve[1][0] == [1] and curve[1][1] == pytest.approx(0.2)
    assert at_budget([score for _, score in curve], 0.75) == pytest.approx((0.2 + 0.9) / 2)
