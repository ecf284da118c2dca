"""Router-only steps hold less for the backward pass than steps with gradients through every layer."""

from __future__ import annotations

import torch
from tiny_models import random_batch, tiny_model

from router_tuning.model import route
from router_tuning.speed.tuning_step import MODES, measure_steps


def test_memory_of_a_step_by_what_trains():
    def build():
        return route(tiny_model("llama", num_hidden_layers=8), mod_n=4)

    ids, mask = random_batch(rows=4, tokens=16)
    found = measure_steps(build, {"input_ids": ids, "attention_mask": mask, "labels": ids}, rounds=1)
    saved = {mode: found[mode]["saved_bytes"] for mode in MODES}
    # Five of eight layers are recorded; full tuning also keeps what weight gradients need.
    assert saved["routers"] < 0.75 * saved["forced"] < saved["full"]
    assert found["routers"]["state_bytes"] < found["full"]["state_bytes"] / 50
    assert found["routers_to_forced"]["saved"] == saved["routers"] / saved["forced"]


def test_a_step_of_zero_rate_changes_nothing():
    made = []

    def build():
        made.append(route(tiny_model("llama"), mod_n=2))
        return made[-1]

    ids, mask = random_batch(rows=2, tokens=8)
    measure_steps(build, {"input_ids": ids, "attention_mask": mask, "labels": ids}, rounds=1)
    reference = route(tiny_model("llama"), mod_n=2)
    for model in made:
        for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert torch.allclose(parameter, expected, atol=1e-6), name
