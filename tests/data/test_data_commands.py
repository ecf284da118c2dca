"""The two commands as they are typed: published command lines, messages, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from raw_data import read_jsonl, sample_rows, write_rows

from router_tuning.data.formats import FORMATS


def run(root: Path, entry: str, *options: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "entrypoints" / "data" / entry), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def error_of(done: subprocess.CompletedProcess, code: int = 2) -> str:
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


def raw_sets(folder: Path, *names: str) -> Path:
    for name in names:
        write_rows(folder / name / "rows", sample_rows(name, 20), ".jsonl")
    return folder


def test_published_command_lines_from_another_folder(tmp_path: Path, root: Path):
    raw_sets(tmp_path / "data" / "raw", *FORMATS)
    options = ("--raw_data_root", "./data/raw", "--save_path", "./data/reformatted")
    done = run(root, "reformat_datasets.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"{name:<18}         20         20" in done.stdout for name in FORMATS)
    options = ("--reformatted_dir", "./data/reformatted", "--save_path", "./data/mixed")
    done = run(root, "mix_datasets.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mixed = read_jsonl(tmp_path / "data" / "mixed" / "data.jsonl")
    assert len(mixed) == 58 + 4 * 20 and not any(row["dataset"] == "alpaca" for row in mixed)
    report = json.loads((tmp_path / "data" / "mixed" / "mix.json").read_text())
    assert report["seed"] == 233 and report["sets"]["vicuna_sharegpt"]["mixed"] == 58


def test_absent_sets_are_named(tmp_path: Path, root: Path):
    raw = raw_sets(tmp_path / "raw", "alpaca", "slim_orca")
    options = ("--raw_data_root", raw, "--save_path", tmp_path / "out")
    done = run(root, "reformat_datasets.py", *options)
    assert done.returncode == 0
    assert "not converted: vicuna_sharegpt, evol_instruct, meta_math_qa, evol_code_alpaca" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alpaca", "slim_orca"]
    error = error_of(run(root, "reformat_datasets.py", *options, "--datasets", "alpaca", "meta_math_qa"))
    assert "meta_math_qa" in error and "alpaca," not in error
    error = error_of(
        run(root, "mix_datasets.py", "--reformatted_dir", tmp_path / "out", "--save_path", tmp_path / "m")
    )
    assert "meta_math_qa" in error and "--portion" in error and not (tmp_path / "m").exists()


def test_bad_arguments(tmp_path: Path, root: Path):
    raw = raw_sets(tmp_path / "raw", "alpaca")
    out = ("--save_path", tmp_path / "out")
    cases = [
        (("--raw_data_root", tmp_path / "none", *out), "none"),
        (("--raw_data_root", tmp_path, *out), "vicuna_sharegpt"),
        (("--raw_data_root", raw, *out, "--datasets", "alpacca"), "alpacca"),
        (("--raw_data_root", raw, *out, "--source", "alpaca"), "NAME=WHERE"),
        (("--raw_data_root", raw, *out, "--source", "alpaca=./nowhere"), "nowhere"),
        (("--raw_data_root", raw, *out, "--workers", "0"), "--workers"),
        (("--raw_data_root", raw, *out, "--max_reject_rate", "2"), "--max_reject_rate"),
    ]
    for options, message in cases:
        assert message in error_of(run(root, "reformat_datasets.py", *options))
        assert not (tmp_path / "out").exists()


def test_too_many_rejects_exit_1(tmp_path: Path, root: Path):
    raw = raw_sets(tmp_path / "raw", "slim_orca")
    path = write_rows(raw / "alpaca" / "rows", sample_rows("alpaca", 20), ".jsonl")
    with path.open("a") as file:
        file.write('{"instruction": "cut he')
    options = ("--raw_data_root", raw, "--save_path", tmp_path / "out")
    assert "1 of 21 rows" in error_of(run(root, "reformat_datasets.py", *options), 1)
    assert (tmp_path / "out" / "slim_orca" / "data.jsonl").exists()
    assert not (tmp_path / "out" / "alpaca" / "data.jsonl").exists()
    done = run(root, "reformat_datasets.py", *options, "--resume", "--max_reject_rate", "0.05")
    assert done.returncode == 0 and "complete before" in done.stdout and "not_json 1" in done.stdout


@pytest.mark.parametrize("entry", ["reformat_datasets.py", "mix_datasets.py", "preview_data.py"])
def test_help_is_there(entry: str, root: Path):
    done = run(root, entry, "--help")
    assert done.returncode == 0 and "usage" in done.stdout
    if entry == "mix_datasets.py":
        assert "--portion alpaca=1" in done.stdout
