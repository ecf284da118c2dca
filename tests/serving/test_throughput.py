"""What is counted and timed of vLLM, with a stand-in for it: shares of kept tokens, thresholds of budgets, ratios."""

from __future__ import annotations

import json
from itertools import accumulate, chain, repeat
from types import SimpleNamespace

import pytest
import torch

from router_tuning.model.saving import CONFIG_NAME, FORMAT
from router_tuning.serving import throughput as measuring

DIAL = {"capacity": [0.0, 1.0], "flops": [0.4, 1.0], "logit": {"1.mlp": [4.0, -4.0]}}


class Module:
    """Routed: keeps every fourth token at a high threshold, else all."""

    threshold = 0.0

    def mod_places(self, hidden):
        return torch.arange(0, len(hidden), 4) if self.threshold > 0.5 else None


class StandIn:
    """An engine with one routed module, or none."""

    def __init__(self, routed: bool):
        self.module, self.resets = Module(), 0
        self.model = SimpleNamespace(mod_modules={"1.mlp": self.module} if routed else {})
        self.model.set_thresholds = lambda found: setattr(self.module, "threshold", found["1.mlp"])

    def reset_prefix_cache(self):
        self.resets += 1

    def apply_model(self, function):
        function(self.model)

    def generate(self, prompts, new_tokens):
        for module in self.model.mod_modules.values():
            module.mod_places(torch.zeros(8, 2))
        return [[0] * new_tokens for _ in prompts]


def test_budgets_are_set_counted_and_timed_in_turns(tmp_path, monkeypatch):
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"format": FORMAT, "dial": DIAL}))
    turns = accumulate(
        chain.from_iterable(repeat([1.0, 4.0, 1.0, 4.0, 1.0, 2.0], 2))
    )  # gap, dense; gap, all; gap, some
    monkeypatch.setattr(measuring, "vllm_tokens", StandIn.generate)
    monkeypatch.setattr(measuring, "_clock", lambda: lambda: next(turns))
    llms = {"dense": StandIn(False), "routed": StandIn(True)}
    rows = measuring.throughput(llms, tmp_path, [1.0, 0.4], [[1], [2]], new_tokens=10, repeats=2)
    assert [row["budget"] for row in rows] == [None, 1.0, 0.4]
    assert [row["kept"] for row in rows] == [{}, {"1.mlp": 1.0}, {"1.mlp": 0.25}]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([5.0, 5.0, 10.0])
    assert [row["ratio"] for row in rows] == pytest.approx([1.0, 1.0, 2.0])
    assert llms["routed"].resets == 6, "what is cached belongs to other thresholds"
    assert "mod_places" not in vars(llms["routed"].module)
