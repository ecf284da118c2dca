"""The commands around the scorer: two processes score what one does, and tables say so in two notations."""

import json
import os
import subprocess
import sys

import pytest
from tiny_checkpoint import write_dial, write_run
from transformers import LlamaModel

from router_tuning.checkpoint.loading import load_tuned
from router_tuning.model.saving import thresholds_for

TASKS = ["mod_copy_gen", "mod_math_mc"]


@pytest.fixture(scope="module")
def where(base, run):
    return ["--run", run, "--base", base, "--tasks", *TASKS, "--limit", "5", "--batch_size", "2"]


@pytest.fixture
def tuned(command, where, tmp_path):
    """What scoring leaves."""
    assert command("evaluate/evaluate_mod.py", *where, "--output", tmp_path / "tuned.jsonl") == 0
    return json.loads((tmp_path / "tuned.jsonl").read_text())["tasks"]


def test_scores_stand_in_a_table(command, capsys, tuned, tmp_path):
    assert "mod_math_mc" in capsys.readouterr().out
    assert set(tuned) == set(TASKS) and all(0 < tuned[task]["share"] < 1 for task in TASKS)
    assert command("evaluate/results_table.py", tmp_path / "tuned.jsonl", "--output", tmp_path / "table-0.5") == 0
    table = (tmp_path / "table-0.5.md").read_text()
    assert "| mod_math_mc | acc_norm |" in table and "±" in table
    assert r"$\pm$" in (tmp_path / "table-0.5.tex").read_text()


@pytest.mark.full
def test_two_processes_share_the_documents_and_one_writes(root, tuned, where, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += [root / "entrypoints/evaluate/evaluate_mod.py", *where, "--output", tmp_path / "two.jsonl"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, launch)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results:") == 1
    two = json.loads((tmp_path / "two.jsonl").read_text())["tasks"]
    for task in TASKS:
        for what in ("scores", "decisions", "capacity", "share"):
            assert two[task][what] == pytest.approx(tuned[task][what], rel=1e-4), what
        for what in ("documents", "requests"):
            assert two[task][what] == tuned[task][what]


def test_a_run_stands_beside_dense_another_recipe_random_and_static(command, root, base, run, tmp_path, capsys):
    rows = root / "data/sample/heldout/add.jsonl"
    published = write_run(tmp_path / "published", base, granularity="attn_token", seed=1)
    (published / "run.json").write_text(json.dumps({"arguments": {"recipe": "paper"}}))
    where = ["--run", run, "--base", base, "--beside", published, "--prompts", rows, "--search_rows", rows]
    few = ["--prompts_per_file", "4", "--search_count", "6", "--new_tokens", "2", "--repeats", "1"]
    assert command("evaluate/compare_run.py", *where, *few, "--tasks", "mod_math_mc", "--limit", "4") == 0
    told = capsys.readouterr().out
    records = [json.loads(line) for line in (run / "evaluation/comparison.jsonl").read_text().splitlines()]
    kinds = [record["cell"]["policy"] for record in records]
    assert kinds == ["dense", "routed", "routed", "random", "static"] and records[2]["cell"]["recipe"] == "paper"
    shares = [record["share"] for record in records]
    assert shares[0] == 1 and shares[2:] == pytest.approx([shares[1]] * 3, abs=0.1)
    assert {step[0] for step in records[-1]["removed"]} <= {"1.attn", "2.attn", "3.attn"}
    for kind in ("dense model", "published recipe", "modules removed for good", "decisions at random"):
        assert kind in told
    cost = records[1]["cost"]["prefill"]
    assert f"{cost['seconds_dense']:.2f} s for 4 prompts" in told  # every number is explained
    assert f"With {shares[1]:.2f} of the operations" in told
    report = (run / "report.md").read_text()
    assert "| less |" in report and "KV cache" in report and "| mod_math_mc |" in report
    assert command("evaluate/results_table.py", run / "evaluation/comparison.jsonl") == 0
    assert "time, prefill" in capsys.readouterr().out
    assert command("evaluate/compare_run.py", "--run", run, "--base", base, "--beside", run) == 2


def test_wrong_input_is_one_line(command, tmp_path, capsys):
    (tmp_path / "list.jsonl").write_text("[]\n")
    wrong = [["results_table.py", tmp_path / "list.jsonl"], ["compare_run.py", "--run", tmp_path / "none"]]
    wrong += [["evaluate_mod.py"], ["evaluate_mod.py", "--run", tmp_path]]
    odd = [("--capacity", "0.5"), ("--limit", 0), ("--limit", -1), ("--limit", "x"), ("--batch_size", 0)]
    odd += [("--num_fewshot", -1), ("--metadata", "[1]"), ("--metadata", "{"), ("--no", 1)]
    for script, *arguments in (*wrong, *(["evaluate_mod.py", "--base", tmp_path, *given] for given in odd)):
        assert command(f"evaluate/{script}", *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: --limit: 0 must be a whole number, at least 1" in lines
    assert len(lines) == 13 and all(line.startswith("error: ") for line in lines), lines


def test_a_run_is_exported_and_both_are_shown(command, root, base, tmp_path, capsys):
    run = write_dial(write_run(tmp_path / "run", base))
    assert command("checkpoint/export.py", "--run", run, "--base", base, "--output", tmp_path / "full") == 0
    assert "bytes written" in capsys.readouterr().out
    prompts = ["--prompts", root / "data/sample/heldout/add.jsonl", "--per_file", "2", "--max_new_tokens", "2"]
    shown = {}
    for name, which in {"run": ["--run", run, "--base", base], "export": ["--model", tmp_path / "full"]}.items():
        output = ["--dial_rows", "2", "--output", tmp_path / f"{name}.html"]
        assert command("analysis/routing_report.py", *which, *prompts, *output) == 0
        shown[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert shown["run"]["prompts"] == shown["export"]["prompts"] and len(shown["run"]["prompts"]) == 2
    assert len(shown["run"]["dial"]) == 10 and shown["run"]["dial"] == shown["export"]["dial"]
    capsys.readouterr()
    scored = ["--tasks", "mod_copy_mc", "--limit", "2"]
    assert command("evaluate/evaluate_mod.py", "--model", tmp_path / "full", "--flops", "0.8", *scored) == 0
    record = json.loads((tmp_path / "full/evaluation/tuned-flops-0.8.jsonl").read_text())
    assert record["cell"]["policy"] == "routed" and record["cell"]["budget"] == 0.8
    capsys.readouterr()
    assert command("evaluate/evaluate_mod.py", "--base", tmp_path / "full") == 2
    assert "is an export, which would run dense here: name it with --model" in capsys.readouterr().err
    for arguments in (("--per_file", "0"), ("--run", run), ("--output", "page.json")):
        assert command("analysis/routing_report.py", "--model", tmp_path / "full", *prompts, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines), lines


@pytest.mark.parametrize("axis", ["capacity", "flops"])
def test_a_dial_is_calibrated_on_rows_of_ones_own_and_turned(command, root, base, tmp_path, monkeypatch, axis):
    seen, forward = [], LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda *args, **given: seen.append(given) or forward(*args, **given))
    run = write_run(tmp_path / "run", base)
    before = (run / "router.safetensors").read_bytes()
    lines = (root / "data/sample/heldout/add.jsonl").read_text().splitlines()[:24]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, lines[0].replace("Compute", "Compute " * 600)]) + "\n")
    rows = ["--data", tmp_path / "rows.jsonl", f"--{axis}", "0.9"]
    assert command("analysis/calibrate.py", "--run", run, "--base", base, *rows) == 0
    assert max(given["input_ids"].shape[1] for given in seen) == 512, "no more than the base has positions"
    config = json.loads((run / "router_config.json").read_text())
    assert config["mod_threshold"] == thresholds_for(config, 0.9, run, axis)
    assert load_tuned(base, run).config.mod_threshold == config["mod_threshold"]
    assert (run / "router.safetensors").read_bytes() == before
