"""The benchmark of the data commands measures all that its report names, within the bound of memory, and tidies up."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest


@pytest.mark.parametrize("kind", ["jsonl", "array"])
def test_one_kind_of_file(kind: str, tmp_path: Path, root: Path):
    script = runpy.run_path(str(root / "entrypoints" / "analysis" / "benchmark_data.py"))
    result = script["benchmark"](kind, 300_000, tmp_path, 1)
    assert 300_000 <= result["bytes"] < 330_000 and result["rows"] > 20
    for name in ("plain_json_loop", "copy_to_disk", "reformat_1_workers", "reformat_2_workers", "mix_dedup"):
        assert result[name]["rows_per_s"] > 0 and result[name]["peak_mb"] < 300
    assert result["reformat_2_workers"]["peak_mb"] > 0
    assert list(tmp_path.iterdir()) == []


def test_generated_files_are_valid(tmp_path: Path, root: Path):
    script = runpy.run_path(str(root / "entrypoints" / "analysis" / "benchmark_data.py"))
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    count = script["write_raw"]("jsonl", lines, 100_000)
    assert len([json.loads(line) for line in lines.open(encoding="utf-8")]) == count
    count = script["write_raw"]("array", array, 100_000)
    assert len(json.loads(array.read_text(encoding="utf-8"))) == count
