"""A whole experiment on a random base: every cell runs once, a killed one again, controls at equal operations."""

import json

import pytest
import yaml
from tiny_tuning import write_conversations

from router_tuning.errors import UserError
from router_tuning.evaluation.records import read_records
from router_tuning.experiments import laboratory
from router_tuning.experiments.laboratory import Laboratory, shard
from router_tuning.experiments.plan import Cell, read_plan
from router_tuning.model import fit_skip_paths
from router_tuning.model.configuration_mod import parse_granularity

RUN = {"global_batch_size": 8, "max_train_samples": 16, "learning_rate": 0.01}
PLAN = {
    "data": "$TINY_DATA/data.jsonl",
    "dtype": "float32",
    "granularities": ["attn_token+mlp_token"],
    "budgets": [0.85, 0.1],
    "recipes": {
        "fisher": {"recipe": "budget", "num_train_epochs": 0, "skip_rank": 8, **RUN},
        "paper": {"recipe": "paper", "granularity": "attn_sequence", "router_pooling": "prompt", **RUN},
    },
    "static": ["zero", "low_rank"],
    "search_tokens": 200,
    "tasks": ["mod_copy_mc"],
    "documents": 3,
    "texts": {
        "words": {"file": "$TINY_DATA/data.jsonl", "first": 16, "documents": 4},
        "story": {"file": "data/sample/heldout/story.jsonl", "documents": 2, "max_tokens": 48},
    },
    "timed": "words",
    "timed_prompts": 2,
    "new_tokens": 2,
    "repeats": 1,
}


@pytest.fixture
def plan_file(tmp_path, base, monkeypatch):
    monkeypatch.setenv("TINY_DATA", str(tmp_path))
    write_conversations(tmp_path / "data.jsonl")

    def write(**changes):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({"base": str(base), **PLAN, **changes}))
        return path

    return write


def test_every_cell_runs_once_at_equal_operations(command, plan_file, tmp_path, capsys, monkeypatch):
    fitted, path = [], plan_file()
    monkeypatch.setattr(
        laboratory, "fit_skip_paths", lambda *given: fitted.append(given[-1]) or fit_skip_paths(*given)
    )
    where = ["--results", tmp_path / "results", "--work", tmp_path / "work"]
    assert command("analysis/experiments.py", path, *where, "--only", "random") == 2
    assert command("analysis/experiments.py", path, *where, "--only", "rondom") == 2
    assert command("analysis/experiments.py", path, *where, "--only", "random", "--build_only") == 2
    assert command("analysis/experiments.py", plan_file(data="none.jsonl"), *where) == 2
    path = plan_file()
    said = capsys.readouterr().err
    for text in ("routed__fisher", "--only rondom", "leave out --only", "none.jsonl is not"):
        assert text in said
    assert command("analysis/experiments.py", path, *where) == 0
    assert "13 cells" in (said := capsys.readouterr().out) and "static low_rank, fisher" in said
    assert fitted == [8, 32], "removed modules have paths of the rank that the recipe beside them has"
    results = tmp_path / "results/small.jsonl"
    names = ("policy", "recipe", "budget")
    records = {tuple(map(r["cell"].get, names)): r for r in read_records(results)}
    assert len(records) == len(results.read_text().splitlines()) == 13
    for (policy, recipe, budget), record in records.items():
        assert ("refused" in record) == (budget == 0.1), record.get("refused")
        if budget == 0.1:
            continue
        assert record["tasks"]["mod_copy_mc"]["samples"] == 3
        assert len(record["texts"]["words"]["documents"]["kl"]) == 4
        if policy.startswith("static"):
            assert record["share"] == pytest.approx(records["routed", recipe, budget]["share"], abs=0.1)
    ours, random = records["routed", "fisher", 0.85], records["random", "fisher", 0.85]
    assert ours["cost"]["prefill"]["time_ratio"] > 0 and "cost" not in random
    assert random["share"] == pytest.approx(ours["share"], abs=0.05)
    assert records["dense", None, None]["texts"]["words"]["kl"] == 0
    assert (tmp_path / "results/small.md").read_text().count("| fisher |") >= 2

    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-1]) + lines[-1][:50])  # killed in its last line
    runs = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("run.json")}
    lab = Laboratory(read_plan(path), results, tmp_path / "work/small")
    assert len(lab.done()) == 12
    lab.run(lab.plan.groups())
    assert len(lab.done()) == len(results.read_text().splitlines()) == 13
    assert runs and runs == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("run.json")}
    assert lab.estimate(lab.plan.groups()) == "nothing is missing"
    other = Laboratory(read_plan(plan_file(documents=2)), results, tmp_path / "work/small")
    assert other.done() == {}, "made with other settings"


def test_shards_share_all_cells_and_keep_together_what_belongs_together(plan_file):
    groups = read_plan(plan_file(seeds=[0, 1, 2])).groups()
    parts = [group for number in (1, 2, 3) for group in shard(groups, number, 3)]
    shared, whole = (sorted(cell.name for group in found for cell in group) for found in (parts, groups))
    assert shared == whole
    for group in groups:
        assert len({(cell.recipe, cell.granularity, cell.seed) for cell in group}) == 1
    statics = [cell for group in groups for cell in group if cell.policy == "static_zero"]
    assert Cell("static_zero", "paper", "attn_sequence", 0, None) in statics and {cell.seed for cell in statics} == {0}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"granularities": ["attn_tokens"]}, "attn_tokens"),
        ({"budgets": [1.5]}, "1.5"),
        ({"colour": "red"}, "colour"),
        ({"static": ["none"]}, "'none'"),
        ({"timed": "nothing"}, "nothing"),
        ({"tasks": [], "texts": {}, "timed": None}, "nothing to score on"),
        ({"texts": {"a": {}}, "timed": None}, "'file'"),
        ({"texts": {"a": {"file": "x", "rows": 3}}, "timed": None}, "rows"),
        ({"texts": {"words": {"file": PLAN["data"], "first": 15}}}, "its rows train recipes"),
    ],
)
def test_a_wrong_plan_is_named(plan_file, changes, named):
    with pytest.raises(UserError, match=named):
        read_plan(plan_file(**changes))


def test_paths_are_of_the_repository_and_name_variables_that_are_set(plan_file, root, tmp_path):
    plan = read_plan(plan_file())
    assert plan.path("data/x") == root / "data/x" and plan.path("${TINY_DATA}/y") == tmp_path / "y"
    with pytest.raises(UserError, match="TINY_MODELS"):
        plan.path("$TINY_MODELS/z")


@pytest.mark.parametrize("name", ["embedded", "moe", "smollm2", "smollm2_granularities"])
def test_plans_of_the_repository_are_sound(root, name):
    plan = read_plan(root / f"configs/experiments/{name}.yaml")
    cells = [cell for group in plan.groups() for cell in group]
    assert plan.name == name and len({cell.name for cell in cells}) == len(cells)
    assert {"dense", "routed", "random"} | {f"static_{kind}" for kind in plan.static} == {c.policy for c in cells}
    assert parse_granularity(plan.removable)
    assert json.dumps([plan.fingerprint(cell) for cell in cells])
