"""The benchmark of the data commands measures all that its report names, on files that are valid."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("array", marks=pytest.mark.full)])
def test_one_kind_of_file(kind: str, tmp_path: Path, root: Path):
    script = runpy.run_path(str(root / "entrypoints" / "analysis" / "benchmark_data.py"))
    raw = tmp_path / "raw"
    count = script["write_raw"](kind, raw, 300_000)
    text = raw.read_text(encoding="utf-8")
    assert count == len(json.loads(text) if kind == "array" else list(map(json.loads, text.splitlines()))) > 20
    raw.unlink()
    result = script["benchmark"](kind, 300_000, tmp_path, 1)
    assert 300_000 <= result["bytes"] < 330_000 and result["rows"] == count
    for name in ("plain_json_loop", "reformat", "mix_dedup"):
        assert result[name]["rows_per_processor_s"] > 0 and result[name]["peak_mb"] < 300
