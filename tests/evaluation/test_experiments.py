"""A whole experiment on a random model: every cell runs once, a repeat does nothing, the report reads the JSON."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from utils.errors import UserError
from utils.evaluation.experiments import Laboratory
from utils.evaluation.experiments_plan import Cell, read_plan
from utils.evaluation.experiments_report import build
from utils.evaluation.experiments_score import score_generation
from utils.model import record_routing, routed_modules, set_thresholds
from utils.model.dial import calibrate
from utils.model.saving import thresholds_for
from utils.pipeline.base_training import build_tokenizer
from utils.pipeline.encoding import render_prompt

PLAN = {
    "name": "small",
    "tasks": ["copy", "max"],
    "granularities": ["attn_sequence", "mlp_token"],
    "budgets": [0.5],
    "dial": [0.3],
    "seeds": [0],
    "train_per_task": 8,
    "search_per_task": 2,
    "items": 3,
    "choices": 2,
    "texts": 2,
    "grid_recipes": ["paper", "budget"],
    "recipes": {
        "paper": {"recipe": "paper", "router_pooling": "prompt", "global_batch_size": 8, "learning_rate": 0.01},
        "budget": {"recipe": "budget", "global_batch_size": 8, "learning_rate": 0.01},
    },
    "statics": {"attn": "exhaustive", "mlp": "greedy"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(320, 20)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plan_file(folder, **changes):
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changes}))
    return path


def test_every_cell_runs_once_and_the_report_reads_them(base, tmp_path):
    plan = read_plan(plan_file(tmp_path, base=str(base)))
    lab = Laboratory(plan, tmp_path / "results", tmp_path / "work")
    cells = list(plan.cells())
    assert len({cell.name for cell in cells}) == len(cells)
    while any([lab.run(cell) for cell in cells]):
        pass
    assert all(lab.path(cell).is_file() for cell in cells), [c.name for c in cells if not lab.path(c).is_file()]
    assert not any(lab.run(cell) for cell in cells)
    assert not list((tmp_path / "work").glob("*.lock"))
    score = lab.read(Cell("score", "budget", "mlp_token", 0, 0.5))
    assert abs(score["conversations"]["total"] - 0.5) < 0.1
    files = build(plan, lab.results, tmp_path / "figures")
    names = {path.name for path in files}
    assert {"small_results.json", "small_dial.svg", "small_pareto.json", "small_dynamics.json"} <= names
    main = json.loads((tmp_path / "figures" / "small_results.json").read_text())
    row = next(r for r in main["rows"] if r["granularity"] == "mlp_token")
    assert row["exact_match"]["mean"] == pytest.approx(score["generation"]["exact_match"]["average"], abs=1e-4)
    assert row["capacity"]["mean"] == pytest.approx(score["conversations"]["total"], abs=1e-4)


def test_a_cell_waits_for_the_run_that_it_scores(base, tmp_path):
    plan = read_plan(plan_file(tmp_path, base=str(base)))
    lab = Laboratory(plan, tmp_path / "results", tmp_path / "work")
    assert not lab.run(Cell("score", "budget", "mlp_token", 0, 0.5))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"granularities": ["attn_tokens"]}, "attn_tokens"),
        ({"budgets": [1.5]}, "1.5"),
        ({"colour": "red"}, "colour"),
        ({"grid_recipes": ["best"]}, "best"),
        ({"tasks": ["juggle"]}, "juggle"),
    ],
)
def test_a_wrong_plan_is_named(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        read_plan(plan_file(tmp_path, base="b", **changes))


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token+mlp_token"])
def test_reading_an_answer_predicts_what_generating_it_wrote(base, tmp_path, granularity):
    """Decisions are taken on the prompt (sequence) or are causal (token): teacher forcing sees what generation did."""
    lab = Laboratory(read_plan(plan_file(tmp_path, base=str(base))), tmp_path / "results", tmp_path / "work")
    model = lab.routed(granularity)
    prompts = [render_prompt(i.messages[:-1], "</s>") for items in lab.held_out(6).values() for i in items]
    batches = [dict(lab.tokenizer(prompt, return_tensors="pt")) for prompt in prompts]
    batches = [{"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]} for b in batches]
    torch.manual_seed(1)
    for module in routed_modules(model).values():
        module.mod_router.weight.data.normal_()
    dial = calibrate(model, batches, capacity=(0.0, 0.5, 1.0))
    set_thresholds(model, thresholds_for({"dial": dial}, 0.5, "here"))
    kept = []
    for batch in batches:
        options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
        written = model.generate(**batch, **options)
        width = batch["input_ids"].shape[1]
        with torch.no_grad(), record_routing(model) as log:
            logits = model(input_ids=written, prompt_length=torch.tensor([width]), use_cache=False).logits
        assert logits[0, width - 1 : -1].argmax(-1).tolist() == written[0, width:].tolist()
        kept.append(log.capacity()["total"])
    assert 0.2 < sum(kept) / len(kept) < 0.8


def test_generation_is_scored_whatever_the_batch(base, tmp_path):
    lab = Laboratory(read_plan(plan_file(tmp_path, base=str(base))), tmp_path / "results", tmp_path / "work")
    model = lab.routed("attn_token")
    found = [score_generation(model, lab.tokenizer, lab.held_out(3), batch_size=size) for size in (1, 3)]
    assert found[0] == found[1] and found[0]["items"] == 6 and found[0]["capacity"]["total"] == 1
