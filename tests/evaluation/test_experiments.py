"""A whole experiment on a random model: every cell runs once, a repeat does nothing, the report reads the JSON."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from router_tuning.embedded.base_training import build_tokenizer
from router_tuning.errors import UserError
from router_tuning.experiments.data import scored_items, search_rows, train_file
from router_tuning.experiments.plan import Cell, read_plan
from router_tuning.experiments.report import build
from router_tuning.experiments.runner import Laboratory
from router_tuning.experiments.score import score_generation
from router_tuning.model import record_routing, routed_modules, set_thresholds
from router_tuning.model.dial import calibrate
from router_tuning.model.saving import thresholds_for
from router_tuning.tuning.encoding import render_prompt

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


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def saved(folder, build):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(320, 20)
    build(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("base"), lambda size: LlamaForCausalLM(LlamaConfig(vocab_size=size, **SIZES)))


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    def build(size):
        return MixtralForCausalLM(MixtralConfig(vocab_size=size, num_local_experts=3, num_experts_per_tok=2, **SIZES))

    return saved(tmp_path_factory.mktemp("moe"), build)


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


def run_all(plan, folder):
    lab = Laboratory(plan, folder / "results", folder / "work")
    while any([lab.run(cell) for cell in plan.cells()]):
        pass
    return lab, {path.name for path in build(plan, lab.results, folder / "figures")}


def test_a_mixture_of_experts_reports_assigned_and_executed_tokens(moe, tmp_path):
    changes = {"granularities": ["expert_token"], "statics": {"expert": "greedy"}, "costs": False}
    plan = read_plan(plan_file(tmp_path, base=str(moe), **changes))
    lab, names = run_all(plan, tmp_path)
    assert all(lab.path(cell).is_file() for cell in plan.cells())
    assert {"small_expert_rt.json", "small_expert_rt.md"} <= names
    rows = json.loads((tmp_path / "figures" / "small_expert_rt.json").read_text())["budgets"]
    row = next(row for row in rows if row["budget"] == 0.5)
    shares = []
    for found in row["experts"].values():
        assert all(ran <= given for ran, given in zip(found["executed"], found["assigned"], strict=True))
        shares.append(sum(found["executed"]) / sum(found["assigned"]))
    totals = {sum(found["assigned"]) for found in row["experts"].values()}
    assert len(row["experts"]) == 2 and len(totals) == 1 and totals.pop() % 2 == 0  # two experts for every token
    assert 0 < sum(shares) / 2 < 1
    generation = lab.read(Cell("score", "budget", "expert_token", 0, 0.5))["generation"]["capacity"]
    assert all(0 < generation[phase] < 1 for phase in ("prompt", "total"))
    static = lab.read(Cell("static", "greedy", "expert"))["sizes"]["1"]
    assert static["capacity"] == pytest.approx(0.5) and len(static["kept"]) == 1


def test_controls_run_on_every_seed_and_lora_stands_beside_routers(base, tmp_path):
    lora = {"recipe": "paper", "router_pooling": "prompt", "lora": True, "global_batch_size": 8}
    changes = {
        "granularities": ["attn_sequence"],
        "grid_recipes": [],
        "seeds": [0, 1],
        "statics": {},
        "dial": [],
        "recipes": {"both": lora, "alone": {**lora, "threshold": 0.0, "target_capacity": 1.0}},
        "extra": [{"recipe": name, "granularity": "attn_sequence"} for name in ("both", "alone")],
    }
    plan = read_plan(plan_file(tmp_path, base=str(base), **changes))
    lab = Laboratory(plan, tmp_path / "results", tmp_path / "work")
    for cell in plan.cells():
        if cell.kind in ("tune", "score"):
            assert lab.run(cell), cell.name
    build(plan, lab.results, tmp_path / "figures")
    rows = json.loads((tmp_path / "figures" / "small_lora_rt.json").read_text())["rows"]
    assert [(row["trained"], row["capacity"]["n"]) for row in rows] == [("LoRA and routers", 2), ("LoRA", 2)]
    assert rows[1]["capacity"]["mean"] == 1


def test_settings_are_chosen_on_other_items_than_are_scored_or_trained_on(base, tmp_path):
    plan, held_out = (
        read_plan(plan_file(tmp_path, base=str(base), scored=which)) for which in ("validation", "heldout")
    )
    chosen = {str(item.messages) for items in scored_items(plan, 20).values() for item in items}
    scored = {str(item.messages) for items in scored_items(held_out, 20).values() for item in items}
    rows = [json.loads(line) for line in train_file(plan, tmp_path, "budget", 0).read_text().splitlines()]
    trained = {str(row["messages"]) for row in rows}
    searched = {str(row["messages"]) for row in search_rows(plan)}
    assert len(chosen) == 40 and not chosen & (scored | trained | searched)


def test_a_recipe_with_its_own_sources_trains_on_as_many_rows(base, tmp_path):
    plan = read_plan(plan_file(tmp_path, base=str(base), sources={"budget": ["story"]}))
    usual, own = (train_file(plan, tmp_path, recipe, 0).read_text().splitlines() for recipe in ("paper", "budget"))
    assert len(usual) == len(own) == 16
    assert {json.loads(line)["dataset"] for line in usual} == {"copy", "max"}
    assert {json.loads(line)["dataset"] for line in own} == {"story"}


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
        ({"sources": {"budget": ["mime"]}}, "mime"),
        ({"training": {"fast": {}}}, "fast"),
        ({"scored": "everything"}, "everything"),
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
    prompts = [
        render_prompt({"messages": i.messages}, lab.tokenizer) for items in lab.held_out(6).values() for i in items
    ]
    batches = [dict(lab.tokenizer(prompt, return_tensors="pt")) for prompt in prompts]
    batches = [{"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]} for b in batches]
    torch.manual_seed(1)
    for module in routed_modules(model).values():
        module.mod_router.weight.data.normal_()
    dial = calibrate(model, batches, grid=(0.0, 0.5, 1.0))
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


@pytest.mark.parametrize("kind, granularity", [("base", "attn_token"), ("moe", "expert_token")])
def test_generation_is_scored_whatever_the_batch(request, tmp_path, kind, granularity):
    plan = read_plan(plan_file(tmp_path, base=str(request.getfixturevalue(kind))))
    lab = Laboratory(plan, tmp_path / "results", tmp_path / "work")
    model = lab.routed(granularity)
    found = [score_generation(model, lab.tokenizer, lab.held_out(3), batch_size=size) for size in (1, 3)]
    assert found[0] == found[1] and found[0]["items"] == 6
    assert found[0]["capacity"] == {"total": 1, "prompt": 1, "generated": 1}
