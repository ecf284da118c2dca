"""Sample data on disk: what git holds is what the generator writes, in the shapes of the six raw formats."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from router_tuning.embedded.sample_files import distinct_items, sample_files
from router_tuning.embedded.sample_tasks import TASKS, Item

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data" / "sample"


@pytest.mark.parametrize("relative", sorted(sample_files(128)))
def test_committed_file_equals_the_regenerated_one(relative: str):
    assert (SAMPLE / relative).read_bytes() == sample_files(128)[relative]().encode()


def test_no_other_file_is_there():
    found = {str(path.relative_to(SAMPLE)) for path in SAMPLE.rglob("*") if path.is_file()}
    assert found == set(sample_files(128))


@pytest.mark.parametrize("task", TASKS)
def test_held_out_rows_read_back_and_stay_out_of_training(task: str):
    lines = (SAMPLE / "heldout" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    items = [Item(**json.loads(line)) for line in lines]
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
