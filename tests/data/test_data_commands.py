"""The two commands as they are typed: published command lines, messages, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from raw_data import raw_sets, read_jsonl

from router_tuning.data.formats import FORMATS


@pytest.fixture
def run(command, capsys) -> Callable[..., str]:
    """What a command writes when it succeeds, or the one line of error when it ends with another ``code``."""

    def call(entry: str, *options: object, code: int = 0) -> str:
        assert command(f"data/{entry}", *options) == code
        told = capsys.readouterr()
        if code == 0:
            return told.out
        (line,) = told.err.splitlines()
        assert line.startswith("error: ")
        return line

    return call


def test_published_command_lines_from_another_folder(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    raw_sets(tmp_path / "data" / "raw", 20, *FORMATS)
    options = ("--raw_data_root", "./data/raw", "--save_path", "./data/reformatted")
    told = run("reformat_datasets.py", *options)
    assert all(f"{name:<18}         20         20" in told for name in FORMATS)
    options = ("--reformatted_dir", "./data/reformatted", "--save_path", "./data/mixed")
    run("mix_datasets.py", *options)
    mixed = read_jsonl(tmp_path / "data" / "mixed" / "data.jsonl")
    assert len(mixed) == 58 + 4 * 20 and not any(row["dataset"] == "alpaca" for row in mixed)
    report = json.loads((tmp_path / "data" / "mixed" / "mix.json").read_text())
    assert report["seed"] == 233 and report["sets"]["vicuna_sharegpt"]["mixed"] == 58
    by_id = {
        row["id"]: row for name in FORMATS for row in read_jsonl(tmp_path / "data/reformatted" / name / "data.jsonl")
    }
    assert all(row == by_id[row["id"]] for row in mixed)


def test_absent_sets_are_named(tmp_path: Path, run):
    raw = tmp_path / "raw"
    raw_sets(raw, 20, "alpaca", "slim_orca")
    options = ("--raw_data_root", raw, "--save_path", tmp_path / "out")
    told = run("reformat_datasets.py", *options)
    assert "not converted: vicuna_sharegpt, evol_instruct, meta_math_qa, evol_code_alpaca" in told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alpaca", "slim_orca"]
    error = run("reformat_datasets.py", *options, "--datasets", "alpaca", "meta_math_qa", code=2)
    assert "meta_math_qa" in error and "alpaca," not in error
    places = ("--reformatted_dir", tmp_path / "out", "--save_path", tmp_path / "m")
    error = run("mix_datasets.py", *places, code=2)
    assert "meta_math_qa" in error and "--portion" in error and not (tmp_path / "m").exists()


def test_bad_arguments(tmp_path: Path, run):
    raw = tmp_path / "raw"
    raw_sets(raw, 20, "alpaca")
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
        assert message in run("reformat_datasets.py", *options, code=2)
        assert not (tmp_path / "out").exists()


def test_too_many_rejects_exit_1(tmp_path: Path, run):
    raw = tmp_path / "raw"
    with raw_sets(raw, 20, "slim_orca", "alpaca")["alpaca"].open("a") as file:
        file.write('{"instruction": "cut he')
    options = ("--raw_data_root", raw, "--save_path", tmp_path / "out")
    assert "1 of 21 rows" in run("reformat_datasets.py", *options, code=1)
    assert (tmp_path / "out" / "slim_orca" / "data.jsonl").exists()
    assert not (tmp_path / "out" / "alpaca" / "data.jsonl").exists()
    told = run("reformat_datasets.py", *options, "--resume", "--max_reject_rate", "0.05")
    assert "complete before" in told and "not_json 1" in told
