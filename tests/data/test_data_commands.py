"""The two commands as they are typed: published command lines, messages, exit codes."""

import json

import pytest
from raw_data import raw_sets, read_jsonl

from router_tuning.data.formats import FORMATS


@pytest.fixture
def run(command, capsys, tmp_path, monkeypatch):
    """What a command line writes when it succeeds, or the one line of error when it ends with another ``code``."""
    monkeypatch.chdir(tmp_path)

    def call(line, code=0):
        entry, *options = line.split()
        assert command(f"data/{entry}_datasets.py", *options) == code
        told = capsys.readouterr()
        if code == 0:
            return told.out
        (line,) = told.err.splitlines()
        assert line.startswith("error: ")
        return line

    return call


REFORMAT = "reformat --raw_data_root ./data/raw --save_path ./data/reformatted"
MIX = "mix --reformatted_dir ./data/reformatted --save_path ./data/mixed"


def test_published_command_lines_from_another_folder(tmp_path, run):
    raw_sets(tmp_path / "data" / "raw", 20, *FORMATS)
    told = run(REFORMAT)
    assert all(f"{name:<18}         20         20" in told for name in FORMATS)
    run(MIX)
    mixed = read_jsonl(tmp_path / "data" / "mixed" / "data.jsonl")
    assert len(mixed) == 58 + 4 * 20 and not any(row["dataset"] == "alpaca" for row in mixed)
    report = json.loads((tmp_path / "data" / "mixed" / "mix.json").read_text())
    assert report["seed"] == 233 and report["sets"]["vicuna_sharegpt"]["mixed"] == 58
    made = [row for name in FORMATS for row in read_jsonl(tmp_path / "data/reformatted" / name / "data.jsonl")]
    by_id = {row["id"]: row for row in made}
    assert all(row == by_id[row["id"]] for row in mixed)


def test_absent_sets_are_named(tmp_path, run):
    raw_sets(tmp_path / "data" / "raw", 20, "alpaca", "slim_orca")
    assert "not converted: vicuna_sharegpt, evol_instruct, meta_math_qa, evol_code_alpaca" in run(REFORMAT)
    assert sorted(path.name for path in (tmp_path / "data/reformatted").iterdir()) == ["alpaca", "slim_orca"]
    error = run(f"{REFORMAT} --datasets alpaca meta_math_qa", code=2)
    assert "meta_math_qa" in error and "alpaca," not in error
    error = run(MIX, code=2)
    assert "meta_math_qa" in error and "--portion" in error and not (tmp_path / "data/mixed").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--raw_data_root none", "none"),
        ("--raw_data_root data", "vicuna_sharegpt"),
        ("--datasets alpacca", "alpacca"),
        ("--source alpaca", "NAME=WHERE"),
        ("--source alpaca=./nowhere", "nowhere"),
        ("--workers 0", "--workers"),
        ("--max_reject_rate 2", "--max_reject_rate"),
    ],
)
def test_bad_arguments(wrong, message, tmp_path, run):
    raw_sets(tmp_path / "data" / "raw", 20, "alpaca")
    assert message in run(f"{REFORMAT} {wrong}", code=2) and not (tmp_path / "data/reformatted").exists()


def test_too_many_rejects_exit_1(tmp_path, run):
    with raw_sets(tmp_path / "data" / "raw", 20, "slim_orca", "alpaca")["alpaca"].open("a") as file:
        file.write('{"instruction": "cut he')
    assert "1 of 21 rows" in run(REFORMAT, code=1)
    made = [path.parent.name for path in (tmp_path / "data/reformatted").glob("*/data.jsonl")]
    assert made == ["slim_orca"]
    told = run(f"{REFORMAT} --resume --max_reject_rate 0.05")
    assert "complete before" in told and "not_json 1" in told
