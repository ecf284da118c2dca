"""Sample data on disk: what git holds is what the generator writes, in the shapes of the six raw formats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from router_tuning.embedded.sample_files import RAW_FILES, distinct_items, raw_text, read_heldout, sample_files
from router_tuning.embedded.sample_tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "sample"


@pytest.mark.parametrize("relative", sorted(sample_files(128)))
def test_committed_file_equals_the_regenerated_one(relative: str):
    assert (SAMPLE / relative).read_bytes() == sample_files(128)[relative]().encode()


def test_no_other_file_is_there():
    found = {str(path.relative_to(SAMPLE)) for path in SAMPLE.rglob("*") if path.is_file()}
    assert found == set(sample_files(128))


def rows(name: str) -> list[dict]:
    text = raw_text(name)
    return json.loads(text) if RAW_FILES[name][0].endswith(".json") else list(map(json.loads, text.splitlines()))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("vicuna_sharegpt", {"id", "conversations"}),
        ("evol_instruct", {"idx", "conversations"}),
        ("slim_orca", {"conversations"}),
        ("meta_math_qa", {"query", "response"}),
        ("evol_code_alpaca", {"instruction", "output"}),
        ("alpaca", {"instruction", "input", "output"}),
    ],
)
def test_raw_shapes(name: str, keys: set[str]):
    found = rows(name)
    assert len(found) >= 400 and all(set(row) == keys for row in found)
    for row in found:
        if "conversations" in row:
            extra = {"weight"} if name == "slim_orca" else set()
            assert all(set(turn) == {"from", "value"} | extra for turn in row["conversations"])
            senders = [turn["from"] for turn in row["conversations"] if turn["from"] != "system"]
            assert senders == ["human", "gpt"] * (len(senders) // 2)
        else:
            assert all(isinstance(value, str) for value in row.values())


def test_sizes_and_mixture():
    assert sum((SAMPLE / "raw" / name / file).stat().st_size for name, (file, _) in RAW_FILES.items()) < 1_500_000
    assert any(row["conversations"][0]["from"] == "system" for row in rows("slim_orca"))
    assert {bool(row["input"]) for row in rows("alpaca")} == {True, False}
    assert all(len(row["conversations"]) == 6 for row in rows("vicuna_sharegpt"))


@pytest.mark.parametrize("task", TASKS)
def test_held_out_rows_read_back_and_stay_out_of_training(task: str):
    items = read_heldout(SAMPLE / "heldout" / f"{task}.jsonl")
    assert items == distinct_items(task, "heldout", 128) and len(items) == 128
    prompts = {json.dumps(item.messages[:-1]) for item in items}
    assert len(prompts) == 128
    assert not prompts & {json.dumps(item.messages[:-1]) for item in distinct_items(task, "train", 400)}


def test_command_writes_the_same_bytes_and_refuses_nonsense(tmp_path: Path):
    command = [sys.executable, ROOT / "entrypoints/data/make_sample_data.py", "--save_path", tmp_path / "out"]
    done = subprocess.run([*command, "--heldout_items", "3"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "19 files" in done.stdout, done.stderr
    file = Path("raw/alpaca/alpaca_data.json")
    assert (tmp_path / "out" / file).read_bytes() == (SAMPLE / file).read_bytes()
    assert len((tmp_path / "out/heldout/sort.jsonl").read_text().splitlines()) == 3
    bad = subprocess.run([*command, "--heldout_items", "0"], capture_output=True, text=True, cwd=tmp_path)
    assert (bad.returncode, bad.stderr) == (2, "error: --heldout_items must be at least 1, not 0\n")
