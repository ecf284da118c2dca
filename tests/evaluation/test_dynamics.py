"""Known distributions of decisions have known entropies."""

from __future__ import annotations

import pytest

from router_tuning.viewer.dynamics import dynamics


def test_a_static_policy_has_no_entropy():
    found = dynamics({"a": [[1, 0]] * 5, "b": [[1, 0]] * 3})
    assert found["mask_entropy"] == 0 and found["task_information"] == 0 and found["masks"] == 1


def test_a_mask_per_task_is_all_information():
    found = dynamics({"a": [[1, 1]] * 4, "b": [[0, 1]] * 4})
    assert found["mask_entropy"] == found["task_information"] == found["routers"][0]["information"] == pytest.approx(1)
    assert found["routers"][1] == {"kept": 1.0, "entropy": 0.0, "information": 0.0}
    assert found["kept_by_task"] == {"a": [1.0, 1.0], "b": [0.0, 1.0]}


def test_noise_has_entropy_and_no_information():
    found = dynamics({task: [[0], [1]] * 8 for task in "ab"})
    assert found["mask_entropy"] == pytest.approx(1) and found["task_information"] == pytest.approx(0)
    with pytest.raises(ValueError, match="no decisions"):
        dynamics({"a": []})
