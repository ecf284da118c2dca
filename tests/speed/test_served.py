"""What is timed of vLLM, with a stand-in for it: thresholds of budgets, in turns; what is left says our engine."""

import json
from types import SimpleNamespace

import pytest
from tiny_routed import routed_model

from router_tuning.model import routed_modules
from router_tuning.model.flops import flops_share
from router_tuning.model.saving import CONFIG_NAME, FORMAT
from router_tuning.speed import served


class StandIn:
    """An engine whose batch takes as long as its thresholds say."""

    def __init__(self, clock):
        self.clock, self.seconds, self.resets = clock, 4.0, 0
        self.model = SimpleNamespace(set_thresholds=self.set_thresholds)

    def set_thresholds(self, thresholds):
        self.seconds = 2.0 if thresholds["1.mlp"] > 0.5 else 4.0

    def reset_prefix_cache(self):
        self.resets += 1

    def apply_model(self, function):
        function(self.model)

    def generate(self, prompts, new_tokens):
        self.clock[0] += self.seconds


def test_budgets_are_set_and_timed_in_turns(tmp_path, monkeypatch):
    model = routed_model("llama", "mlp_token", mod_layers=[1])
    dial = {"capacity": [0.0, 1.0], "flops": [0.4, 1.0], "logit": {"1.mlp": [40.0, -40.0]}}
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"format": FORMAT, "dial": dial}))
    clock = [0.0]
    monkeypatch.setattr(served, "vllm_tokens", StandIn.generate)
    monkeypatch.setattr(served, "clock", lambda: clock[0])
    llms = {"dense": StandIn(clock), "routed": StandIn(clock)}
    rows = served.throughput(llms, model, tmp_path, [1.0, 0.4], [[5], [6, 7]], new_tokens=10, repeats=2)
    assert [row["budget"] for row in rows] == [None, 1.0, 0.4]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([5.0, 5.0, 10.0])
    assert [row["ratio"] for row in rows] == pytest.approx([1.0, 1.0, 2.0])
    assert [row["flops_share"] for row in rows] == pytest.approx([1.0, 1.0, flops_share(model, 0.0)])
    assert llms["routed"].resets == 6, "what is cached belongs to other thresholds"


def test_what_vllm_gives_is_compared_with_what_we_give(monkeypatch):
    model, prompts = routed_model("llama", "mlp_token"), [[5, 6], [7], [8, 9, 4], [3]]
    expected = served.our_tokens(model, prompts, 4)
    assert [len(tokens) for tokens in expected] == [4] * 4 and routed_modules(model)
    wrong = [expected[0], [60, *expected[1][1:]], *expected[2:]]
    by_prompt = {tuple(prompt): tokens for prompt, tokens in zip(prompts, wrong, strict=True)}
    monkeypatch.setattr(served, "vllm_tokens", lambda _, asked, __: [by_prompt[tuple(ids)] for ids in asked])
    names = ("vllm:num_preemptions", "vllm:prefix_cache_hits")
    llm = SimpleNamespace(get_metrics=lambda: [SimpleNamespace(name=name, value=7) for name in names])
    found = served.equality(llm, prompts, expected)
    assert (found["batch"], found["equal_in_batch"], found["alone"], found["equal_alone"]) == (4, 3, 2, 2)
    assert found["same_tokens"] == pytest.approx(23 / 24) and found["preemptions"] == found["prefix_hits"] == 7
