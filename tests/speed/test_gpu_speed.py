"""The run on a GPU, rehearsed on a CPU: every cell, a journal that survives cuts and failures, and the table."""

import itertools
import os
import runpy
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_model

from router_tuning.files import read_json_lines
from router_tuning.model import ModConfig, route
from router_tuning.speed import steps
from router_tuning.speed.cells import Cell, measured, run_cells
from router_tuning.speed.table import speed_tables

ABOUT = {"device": "this one"}


@pytest.mark.full
def test_the_script_runs_every_cell_and_its_file_gives_the_tables(root, tmp_path):
    journal, script = tmp_path / "tiny.jsonl", root / "scripts/gpu_speed.sh"
    command = ["bash", str(script), "--shape", "tiny", "--output", str(journal)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_json_lines(journal)
    assert [row for row in rows if "failed" in row or "not_started" in row] == []
    names = ("phase", "batch", "length", "granularity", "skip", "decisions")
    timed = [tuple(row[name] for name in names) for row in rows if "time_ratio" in row]
    ways = [*itertools.product(("attn_sequence", "attn_token+mlp_token"), ("zero", "low_rank"), (0.5, 1.0))]
    workloads = [("prefill", 2, 8), ("decode", 1, 8), ("decode", 8, 8), ("prefill", 1, 16)]
    assert timed == [(*workload, *way) for workload in workloads for way in ways]
    tables = speed_tables(measured(rows))
    assert len(tables["speed"].rows) == len(timed) and len(tables["profile"].rows) == len(timed) / 4
    names = [row[0] for row in tables["other"].rows]
    assert names == ["training step, routers 2×8", *(f"compiled decoding, dense {b}×8" for b in (1, 8))]
    assert all(table.text() in done.stdout for table in tables.values())


def run(*arguments, about=ABOUT, **outcomes):
    """Cells that give a value, or raise an error, by name."""

    def outcome(name):
        if isinstance(outcomes[name], Exception):
            raise outcomes[name]
        return [{"value": outcomes[name]}]

    return list(run_cells([Cell(n, "kind", lambda n=n: outcome(n)) for n in outcomes], *arguments, about))


def test_a_cell_that_fails_is_told_and_the_next_one_runs(tmp_path):
    journal = tmp_path / "cells.jsonl"
    run(journal, a=1, b=torch.OutOfMemoryError("too large"), c=3)
    header, a, b, c = read_json_lines(journal)
    assert header == {"run": ABOUT} and (a["value"], c["value"]) == (1, 3)
    assert b["cell"] == "b" and b["failed"] == "OutOfMemoryError: too large"


def test_a_later_run_goes_on_where_a_cut_one_ended(tmp_path):
    journal = tmp_path / "cells.jsonl"
    run(journal, a=1, b=2)
    journal.write_text(journal.read_text()[:-10])  # in the middle of the last line
    run(journal, a=3, b=4, c=5)
    assert [row["value"] for row in measured(read_json_lines(journal))] == [1, 4, 5]
    for number, about in enumerate(({"device": "another"}, ABOUT | {"settings": {"shape": "large"}}), 6):
        run(journal, about=about, a=number)
        assert [row["value"] for row in measured(read_json_lines(journal), about)] == [number]


def test_no_cell_starts_that_would_end_after_the_time(tmp_path, monkeypatch):
    journal, clock = tmp_path / "cells.jsonl", [0.0]
    monkeypatch.setattr("router_tuning.speed.cells.time.perf_counter", lambda: clock[0])

    def wait(seconds):
        clock[0] += seconds
        return [{"value": seconds}]

    plan = (("a", "short", 1), ("b", "long", 40), ("c", "long", 40), ("d", "short", 1))
    list(run_cells([Cell(name, kind, lambda s=s: wait(s)) for name, kind, s in plan], journal, ABOUT, 1.0))
    rows = read_json_lines(journal)
    assert [row["cell"] for row in measured(rows)] == ["a", "b", "d"] and rows[-1]["not_started"] == ["c"]


def test_memory_for_some_caches_only_times_the_skip_paths_one_by_one(root, monkeypatch):
    entrypoint, asked = runpy.run_path(str(root / "entrypoints/analysis/benchmark_speed.py")), []

    def benchmark(dense, setting):
        asked.append(setting.skips)
        if len(setting.skips) > 1:
            raise torch.OutOfMemoryError
        return [{"skip": setting.skips[0]}]

    monkeypatch.setitem(entrypoint["timed_rows"].__globals__, "benchmark", benchmark)
    setting = entrypoint["Setting"]("decode", 1, 8, ModConfig(mod_layers=[1]), (0.5,), 2, ("zero", "low_rank"))
    rows = entrypoint["timed_rows"](tiny_model(), setting)
    assert asked == [("zero", "low_rank"), ("zero",), ("low_rank",)] and len(rows) == 2


@pytest.mark.parametrize("everything", [False, True])
def test_a_training_step_takes_the_rows_that_memory_holds_and_changes_nothing(everything, monkeypatch):
    measure = steps._measured_step

    def bounded(model, ids, rounds):
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return measure(model, ids, rounds)

    monkeypatch.setattr(steps, "_measured_step", bounded)
    model, reference = (route(tiny_model(), mod_layers=[1, 2]) for _ in range(2))
    row = steps.training_step(model, 8, 6, 2, everything)
    assert row["micro_batch"] == 2 and row["seconds_step"] > 0
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(parameter, expected, atol=1e-6) and parameter.grad is None, name
