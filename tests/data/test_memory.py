"""Memory of the commands: bounded, whatever the input; and the benchmark that measures it, on files that are valid."""

import json
import runpy
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from raw_data import GOOD, read_jsonl, write_rows

ROWS = 66_000
OTHERS = ("vicuna_sharegpt=0", "evol_instruct=0", "slim_orca=0", "evol_code_alpaca=0")


def peak_memory(root: Path, entry: str, *options: object) -> int:
    """Bytes at most resident in the largest process of a command, which must succeed."""
    script = runpy.run_path(str(root / "entrypoints" / "analysis" / "benchmark_data.py"))
    return script["measured"]([sys.executable, root / "entrypoints" / "data" / entry, *options])[2]


def many_rows() -> Iterator[dict]:
    """100 MB of rows, each different from the others."""
    return ({"query": f"{number} why? " * 60, "response": "because " * 120} for number in range(ROWS))


OFTEN, SELDOM = (".jsonl", ".parquet"), (".json", ".jsonl.gz", ".jsonl.zst", ".arrow")


@pytest.mark.parametrize("ending", [*OFTEN, *(pytest.param(e, marks=pytest.mark.full) for e in SELDOM)])
def test_memory_does_not_depend_on_the_size(ending, tmp_path, root):
    """100 MB of rows; pyarrow, which tables and zstandard need, is 60 MB itself. The mix is made in as little."""
    # A table gets them in one row group or batch, as some writers do.
    write_rows(tmp_path / "raw" / "meta_math_qa" / "rows", list(many_rows()), ending, batch=ROWS)
    options = ("--raw_data_root", tmp_path / "raw", "--workers", "1", "--save_path", tmp_path / "out")
    memory = peak_memory(root, "reformat_datasets.py", *options)
    assert memory < {".parquet": 250e6, ".arrow": 120e6, ".jsonl.zst": 150e6}.get(ending, 60e6)
    with (tmp_path / "out" / "meta_math_qa" / "data.jsonl").open() as made:
        for row, line in zip(many_rows(), islice(made, 100), strict=False):
            assert json.loads(line)["messages"][0]["content"] == row["query"]
    report = json.loads((tmp_path / "out" / "meta_math_qa" / "reformat.json").read_text())
    assert report["accepted"] == ROWS
    if ending == ".jsonl":
        options = ("--reformatted_dir", tmp_path / "out", "--save_path", tmp_path / "mixed", "--dedup", "--portion")
        assert peak_memory(root, "mix_datasets.py", *options, *OTHERS, "meta_math_qa=1.5") < 200e6


@pytest.mark.parametrize(("size", "rejects"), [(17_000_000, [("row_too_large", 101)]), (12_000_000, [])])
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_large_rows_take_little_memory(size, rejects, layout, tmp_path, root):
    """With one letter of four bytes, which makes Python hold all others in four bytes, too."""
    (tmp_path / "raw" / "alpaca").mkdir(parents=True)
    large = GOOD.replace(b"plain", b"x" * size + "🙂".encode())
    rows = [*[GOOD] * 100, large, GOOD]
    text = b"\n".join(rows) if layout == "lines" else b"[" + b",\n".join(rows) + b"]"
    (tmp_path / "raw" / "alpaca" / "rows.json").write_bytes(text)
    options = ("--raw_data_root", tmp_path / "raw", "--save_path", tmp_path / "out")
    assert peak_memory(root, "reformat_datasets.py", *options) < 300e6
    found = read_jsonl(tmp_path / "out" / "alpaca" / "rejects.jsonl")
    assert [(reject["reason"], reject["line"]) for reject in found] == rejects


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("array", marks=pytest.mark.full)])
def test_the_benchmark_measures_files_that_are_valid(kind, tmp_path, root):
    script = runpy.run_path(str(root / "entrypoints" / "analysis" / "benchmark_data.py"))
    count = script["write_raw"](kind, tmp_path / "raw", 300_000)
    text = (tmp_path / "raw").read_text(encoding="utf-8")
    assert count == len(json.loads(text) if kind == "array" else list(map(json.loads, text.splitlines()))) > 20
    (tmp_path / "raw").unlink()
    result = script["benchmark"](kind, 300_000, tmp_path, 1)
    assert 300_000 <= result["bytes"] < 330_000 and result["rows"] == count
    for name in ("plain_json_loop", "reformat", "mix_dedup"):
        assert result[name]["rows_per_processor_s"] > 0 and result[name]["peak_mb"] < 300
