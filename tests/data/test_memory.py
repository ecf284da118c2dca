"""Memory of the commands: bounded, whatever the input."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import GOOD, read_jsonl

LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(used.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))
"""
"""Starts the command from a small process: the system counts what the parent held at the fork as the child's peak."""

ROWS = 66_000
OTHERS = ("vicuna_sharegpt=0", "evol_instruct=0", "slim_orca=0", "evol_code_alpaca=0")


def peak_memory(root: Path, entry: str, *options: object) -> tuple[int, int]:
    """Bytes at most resident in the process of a command, and its exit code."""
    command = [sys.executable, str(root / "entrypoints" / "data" / entry), *map(str, options)]
    launched = subprocess.run([sys.executable, "-I", "-S", "-c", LAUNCHER, *command], capture_output=True, check=True)
    memory, code = map(int, launched.stdout.split())
    return memory, code


def many_rows() -> Iterator[dict]:
    """100 MB of rows, each different from the others."""
    return ({"query": f"{number} why? " * 60, "response": "because " * 120} for number in range(ROWS))


def write_many(path: Path) -> None:
    """Without ever holding them; a table gets them in one row group, as some writers do."""
    path.parent.mkdir(parents=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(many_rows())), path, row_group_size=ROWS)
        return
    rows = (json.dumps(row) for row in many_rows())
    with gzip.open(path, "wt", 1) if path.suffix == ".gz" else path.open("w") as file:
        if path.suffix == ".json":
            file.write(f"[{next(rows)}")
            file.writelines(f", {row}" for row in rows)
            file.write("]")
        else:
            file.writelines(f"{row}\n" for row in rows)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_memory_does_not_depend_on_the_size(ending: str, tmp_path: Path, root: Path):
    """100 MB of rows; pyarrow, which tables need, is 60 MB itself. The mix of them is made in as little."""
    write_many(tmp_path / "raw" / "meta_math_qa" / f"rows{ending}")
    options = ("--raw_data_root", tmp_path / "raw", "--workers", "1", "--save_path", tmp_path / "out")
    memory, code = peak_memory(root, "reformat_datasets.py", *options)
    assert code == 0 and memory < (250e6 if ending == ".parquet" else 100e6)
    with (tmp_path / "out" / "meta_math_qa" / "data.jsonl").open() as made:
        for row, line in zip(many_rows(), islice(made, 100), strict=False):
            assert json.loads(line)["messages"][0]["content"] == row["query"]
    report = json.loads((tmp_path / "out" / "meta_math_qa" / "reformat.json").read_text())
    assert report["accepted"] == ROWS
    if ending == ".jsonl":
        options = ("--reformatted_dir", tmp_path / "out", "--save_path", tmp_path / "mixed", "--dedup", "--portion")
        memory, code = peak_memory(root, "mix_datasets.py", *options, *OTHERS, "meta_math_qa=1.5")
        assert code == 0 and memory < 200e6


def test_a_line_of_50_mb_is_refused_in_little_memory(tmp_path: Path, root: Path):
    folder = tmp_path / "raw" / "alpaca"
    folder.mkdir(parents=True)
    with (folder / "rows.jsonl").open("wb") as file:
        file.write((GOOD + b"\n") * 150)
        file.write(GOOD.replace(b"plain", "🙂é".encode() * 9_000_000) + b"\n" + GOOD + b"\n")
    memory, code = peak_memory(
        root, "reformat_datasets.py", "--raw_data_root", folder.parent, "--save_path", tmp_path / "o"
    )
    assert code == 0 and memory < 150e6
    (reject,) = read_jsonl(tmp_path / "o" / "alpaca" / "rejects.jsonl")
    assert reject["reason"] == "row_too_large" and reject["line"] == 151
    assert len((tmp_path / "o" / "alpaca" / "data.jsonl").read_bytes().splitlines()) == 151
