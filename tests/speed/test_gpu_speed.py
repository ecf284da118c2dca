"""The run on a GPU, rehearsed on a CPU: every cell, a journal that survives cuts and failures, and the table."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from router_tuning.experiments.readme import gpu_block
from router_tuning.files import read_json_lines
from router_tuning.model import ModConfig
from router_tuning.speed import gpu_plan
from router_tuning.speed.benchmark import Setting
from router_tuning.speed.cells import Cell, measured, run_cells
from router_tuning.speed.gpu_plan import ORDER, SKIPS, TINY, worst
from router_tuning.speed.limits import GRANULARITIES, Accelerator
from router_tuning.speed.table import gpu_tables

ABOUT = {"device": "this one"}


def test_the_script_runs_every_cell_and_its_file_gives_the_table(root, tmp_path):
    journal = tmp_path / "tiny.jsonl"
    command = ["bash", str(root / "scripts/gpu_speed.sh"), "--shape", "tiny", "--output", str(journal)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_json_lines(journal)
    assert [row for row in rows if "failed" in row or "not_started" in row] == []
    timed = {(r["phase"], r["batch"], r["length"], r["granularity"], r["skip"], r["decisions"])
             for r in rows if "time_ratio" in r}  # fmt: skip
    assert timed == {(*workload[:3], granularity, skip, capacity) for workload in TINY.workloads
                     for granularity in GRANULARITIES for skip in SKIPS for capacity in (0.5, 1.0)}  # fmt: skip
    tables, block = gpu_tables(measured(rows)), gpu_block(journal)
    assert all(table.markdown() in block for table in tables.values()) and f"{TINY.tuning[0]}×" in block
    assert len(tables["speed"].rows) == len(TINY.workloads) * len(ORDER)
    assert [row[0].split()[0] for row in tables["other"].rows] == ["tuning", "decode", "decode"]
    assert [row[1] for row in tables["profile"].rows] == ["dense", "ideal", "routed"] * 2
    assert tables["speed"].text() in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_full_size_is_refused_in_one_line(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_speed.py", "--output", str(tmp_path / "full.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(root / "entrypoints/analysis/gpu_speed.py"), run_name="__main__")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "sees no GPU; rehearse on a CPU with --shape tiny" in line
    assert not (tmp_path / "full.jsonl").exists()


def cells(**outcomes):
    def run(name):
        if isinstance(outcomes[name], Exception):
            raise outcomes[name]
        return [{"value": outcomes[name]}]

    return [Cell(name, "kind", lambda name=name: run(name)) for name in outcomes]


def test_a_cell_that_fails_is_told_and_the_next_one_runs(tmp_path):
    journal = tmp_path / "cells.jsonl"
    run_cells(cells(a=1, b=torch.OutOfMemoryError("too large"), c=3), journal, ABOUT)
    header, a, b, c = read_json_lines(journal)
    assert header == {"run": ABOUT} and (a["value"], c["value"]) == (1, 3)
    assert b["cell"] == "b" and b["failed"] == "OutOfMemoryError: too large"


def test_a_later_run_goes_on_where_a_cut_one_ended(tmp_path):
    journal = tmp_path / "cells.jsonl"
    run_cells(cells(a=1, b=2), journal, ABOUT)
    journal.write_text(journal.read_text()[:-10])  # in the middle of the last line
    run_cells(cells(a=3, b=4, c=5), journal, ABOUT)
    assert [(row["cell"], row["value"]) for row in measured(read_json_lines(journal))] == [
        ("a", 1),
        ("b", 4),
        ("c", 5),
    ]
    run_cells(cells(a=6), journal, {"device": "another"})
    assert [row["value"] for row in measured(read_json_lines(journal), "another")] == [6]


def test_no_cell_starts_that_would_end_after_the_time(tmp_path):
    journal = tmp_path / "cells.jsonl"
    run_cells([*cells(a=1), replace(cells(b=2)[0], kind="long", expected=100), *cells(c=3)], journal, ABOUT, 1.0)
    rows = read_json_lines(journal)
    assert [row["cell"] for row in measured(rows)] == ["a", "c"] and rows[-1]["not_started"] == ["b"]


def test_memory_for_some_caches_only_times_the_skip_paths_one_by_one(monkeypatch):
    asked = []

    def benchmark(dense, setting, accelerator):
        asked.append(setting.skips)
        if len(setting.skips) > 1:
            raise torch.OutOfMemoryError
        return [{"skip": setting.skips[0]}]

    monkeypatch.setattr(gpu_plan, "benchmark", benchmark)
    setting = Setting("decode", 1, 8, ModConfig(mod_layers=[1]), (0.5,), 2, ("zero", "low_rank"))
    rows = gpu_plan.timed_rows(tiny_model(), setting, Accelerator("some", 1, 1))
    assert asked == [("zero", "low_rank"), ("zero",), ("low_rank",)] and len(rows) == 2


def test_a_tuning_step_takes_the_rows_that_memory_holds(monkeypatch):
    measure = gpu_plan.measure_steps

    def measure_steps(build, batch, **options):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError
        return measure(build, batch, **options)

    monkeypatch.setattr(gpu_plan, "measure_steps", measure_steps)
    row = gpu_plan.tuning_row(tiny_model(), [1, 2], 8, 6)
    assert row["micro_batch"] == 2 and row["seconds_step"] == 4 * row["seconds"] > 0


def test_the_profile_looks_at_what_lies_furthest_above_its_limit():
    row = {"phase": "decode", "decisions": 0.5, "limit_ratio": 0.8}
    rows = [{**row, "time_ratio": ratio} for ratio in (0.9, 1.1, 1.0)]
    rows += [{**row, "phase": "prefill", "time_ratio": 2.0}, {**row, "decisions": 1.0, "time_ratio": 3.0}]
    assert worst(rows, "decode")["time_ratio"] == 1.1
    with pytest.raises(ValueError, match="nothing to profile"):
        worst([], "decode")
