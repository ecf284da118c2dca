"""The commands around lm-eval: two processes score what one does, and the table says so in two notations."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest

TASKS = ["mod_copy_gen", "mod_math_mc"]


@pytest.fixture
def command(root, monkeypatch):
    """Run an entrypoint in this process; returns its exit code."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(root / "entrypoints" / script), run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    return call


def test_two_processes_share_the_documents_and_one_writes(command, root, base, run, tmp_path, capsys):
    where = ["--run", run, "--base", base, "--tasks", *TASKS, "--limit", "5", "--batch_size", "2"]
    assert command("evaluate/evaluate_mod.py", *where, "--output", tmp_path / "tuned.json") == 0
    assert "mod_math_mc" in capsys.readouterr().out
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = root / "entrypoints/evaluate/evaluate_mod.py"
    call = [*launch, script, *where, "--output", tmp_path / "two.json"]
    done = subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results:") == 1
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("tuned.json", "two.json"))
    for task in TASKS:
        assert two["scores"][task] == pytest.approx(one["scores"][task], rel=1e-6)
        assert two["samples"][task] == one["samples"][task] == 5
        for what in ("requests", "decisions", "capacity"):
            assert two["meter"][task][what] == pytest.approx(one["meter"][task][what], rel=1e-6), what
    assert 0 < one["meter"]["mod_math_mc"]["capacity"]["total"] < 1

    assert command("evaluate/results_table.py", tmp_path / "tuned.json", tmp_path / "two.json",
                   "--output", tmp_path / "table") == 0  # fmt: skip
    table = (tmp_path / "table.md").read_text()
    assert "| mod_math_mc | acc_norm |" in table and "capacity, two" in table and "±" in table
    assert r"$\pm$" in (tmp_path / "table.tex").read_text()


def test_a_comparison_becomes_scores_and_speed_in_two_notations(command, comparison, tmp_path, capsys):
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(comparison))
    assert command("evaluate/results_table.py", path, "--output", tmp_path / "table") == 0
    markdown, latex = (tmp_path / "table.md").read_text(), (tmp_path / "table.tex").read_text()
    assert "| t_gen | exact_match | 0.800 ± 0.010 | 0.700 ± 0.010 | 0.600 ± 0.010 | 0.400 |" in markdown
    assert "| seconds, prompts | 2.000 | 1.000 | 0.510 |" in markdown
    assert latex.count(r"\begin{tabular}") == 2 and r"seconds, prompts & 2.000 & 1.000 & 0.510 \\" in latex
    assert command("evaluate/results_table.py", path, path) == 2
    assert "a comparison stands alone" in capsys.readouterr().err


def test_wrong_input_is_one_line(command, tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    assert command("evaluate/results_table.py", tmp_path / "list.json") == 2
    assert command("evaluate/evaluate_mod.py") == 2
    assert command("evaluate/evaluate_mod.py", "--base", tmp_path, "--capacity", "0.5") == 2
    assert command("evaluate/evaluate_mod.py", "--run", tmp_path) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines), lines


def test_a_run_is_exported_and_both_are_shown(command, root, base, run, tmp_path, capsys):
    assert command("checkpoint/export.py", "--run", run, "--base", base, "--output", tmp_path / "full") == 0
    assert "bytes written" in capsys.readouterr().out
    prompts = ["--prompts", root / "data/sample/heldout/add.jsonl", "--per_file", "2", "--max_new_tokens", "2"]
    shown = {}
    for name, which in {"run": ["--run", run, "--base", base], "export": ["--model", tmp_path / "full"]}.items():
        output = ["--dial_rows", "2", "--output", tmp_path / f"{name}.html"]
        assert command("analysis/routing_report.py", *which, *prompts, *output) == 0
        shown[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert shown["run"]["prompts"] == shown["export"]["prompts"] and len(shown["run"]["prompts"]) == 2
    assert len(shown["run"]["dial"]) > 1 and shown["run"]["dial"] == shown["export"]["dial"]
    capsys.readouterr()
    wrong = ("--picture", tmp_path / "page.jpg"), ("--per_file", "0"), ("--run", run)
    for arguments in wrong:
        assert command("analysis/routing_report.py", "--model", tmp_path / "full", *prompts, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines), lines
