"""Whatever kills a run, resuming it gives the files that an undisturbed run gives."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from raw_data import in_threads, sample_rows, write_rows

from utils.data import conversion, lines, planning
from utils.data.containers import recognise
from utils.data.conversion import Task, convert, load_state
from utils.data.planning import Unit
from utils.data.reformat import Settings, reformat
from utils.data.sources import source_of

FILES = ("data.jsonl", "rejects.jsonl", "reformat.json")


class Killed(Exception):
    """Stands for the end of the process."""


def some_bad_rows(name: str, count: int) -> list[dict]:
    rows = sample_rows(name, count)
    rows[3::11] = [{"query": "no answer", "response": " "}] * len(rows[3::11])
    return rows


@settings(max_examples=200, deadline=None)
@example(ending=".parquet", checkpoint=1, kills=[10], garbage=b"\x00").via("killed with all rows done")
@example(ending=".json", checkpoint=1, kills=[3, 12, 12], garbage=b"").via("killed behind the end of the array")
@given(
    ending=st.sampled_from([".json", ".jsonl", ".jsonl.gz", ".json.zst", ".parquet", ".arrow"]),
    checkpoint=st.integers(1, 3000),
    kills=st.lists(st.integers(0, 12), max_size=3),
    garbage=st.binary(max_size=50),
)
def test_a_unit_killed_anywhere_ends_the_same(ending, checkpoint, kills, garbage, tmp_path_factory):
    base = tmp_path_factory.getbasetemp() / "units"
    source = base / f"rows{ending}"
    if not source.exists():
        write_rows(base / "rows", some_bad_rows("meta_math_qa", 60), ending, indent=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "CHECKPOINT_BYTES", checkpoint)
        patch.setattr(lines, "BLOCK_BYTES", 300)
        patch.setattr("utils.data.array.BLOCK_BYTES", 300)
        patch.setattr("utils.data.tables.BATCH_ROWS", 7)
        results = []
        for calls in ([], kills):
            folder = base / "parts"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            task = Task("meta_math_qa", Unit(recognise(source)), 0, 100, folder, "rows")
            for limit in calls:
                kill_after(task, limit)
                for kind in ("data", "rejects"):
                    with task.path(kind).open("ab") as file:
                        file.write(garbage)
            state = convert(task, lambda rows: None)
            results.append((task.path("data").read_bytes(), task.path("rejects").read_bytes(), state))
    assert results[0] == results[1]
    assert results[0][2].rows == 60 and results[0][2].reasons == {"empty_turn": 6}


def kill_after(task: Task, calls: int) -> None:
    left = [calls]

    def progress(rows: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    try:
        convert(task, progress)
    except Killed:
        pass


def test_resuming_reads_only_what_is_missing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(conversion, "CHECKPOINT_BYTES", 1)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 500)
    path = write_rows(tmp_path / "rows", sample_rows("meta_math_qa", 100), ".jsonl.gz")
    task = Task("meta_math_qa", Unit(recognise(path)), 0, 0, tmp_path, "rows")
    kill_after(task, 9)
    saved = load_state(task).rows
    told: list[int] = []
    convert(task, told.append)
    assert 0 < saved < 100 and told[0] == saved and sum(told) == 100


def test_parts_that_are_lost_are_made_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(conversion, "CHECKPOINT_BYTES", 1)
    path = write_rows(tmp_path / "rows", sample_rows("meta_math_qa", 20), ".jsonl")
    task = Task("meta_math_qa", Unit(recognise(path)), 0, 0, tmp_path, "rows")
    convert(task, lambda rows: None)
    whole = task.path("data").read_bytes()
    for damage in (lambda: task.path("data").unlink(), lambda: os.truncate(task.path("data"), 10)):
        damage()
        assert load_state(task) is None
        convert(task, lambda rows: None)
        assert task.path("data").read_bytes() == whole
    for text in ("{", '{"place": 1}', "[]"):
        task.path("state").write_text(text)
        assert load_state(task) is None


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def test_a_run_that_was_complete_is_left_alone(tmp_path: Path, convert):
    raw = write_rows(tmp_path / "raw" / "rows", sample_rows("alpaca", 30), ".jsonl")
    folder = convert("alpaca", raw)
    before = [(folder / name).stat().st_mtime_ns for name in FILES]
    (outcome,) = reformat([source_of("alpaca", raw)], folder.parent, Settings(resume=True))
    assert outcome.resumed and outcome.accepted == 30
    assert [(folder / name).stat().st_mtime_ns for name in FILES] == before
    time.sleep(0.01)
    write_rows(tmp_path / "raw" / "rows", sample_rows("alpaca", 31), ".jsonl")
    (outcome,) = reformat([source_of("alpaca", raw)], folder.parent, Settings(resume=True))
    assert not outcome.resumed and outcome.accepted == 31


def test_another_file_is_not_taken_for_the_one_begun(tmp_path: Path, monkeypatch, convert):
    monkeypatch.setattr(conversion, "CHECKPOINT_BYTES", 1)
    raw = write_rows(tmp_path / "raw" / "rows", sample_rows("meta_math_qa", 30), ".jsonl")
    (outcome,) = reformat([source_of("meta_math_qa", raw)], tmp_path / "out", Settings(strict=True))
    assert outcome.error is None
    bad = some_bad_rows("meta_math_qa", 30)
    write_rows(tmp_path / "raw" / "rows", bad, ".jsonl")
    (outcome,) = reformat([source_of("meta_math_qa", raw)], tmp_path / "out", Settings(strict=True, resume=True))
    assert outcome.too_many and (tmp_path / "out" / "meta_math_qa" / ".partial").is_dir()
    resumed = convert("meta_math_qa", raw, tmp_path / "out", resume=True)
    assert contents(resumed) == contents(convert("meta_math_qa", raw, tmp_path / "fresh"))


DRIVER = """
import runpy, sys
import utils.data.conversion, utils.data.planning
utils.data.conversion.CHECKPOINT_BYTES = 30_000
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_random_points(workers: int, tmp_path: Path, root: Path):
    raw = tmp_path / "raw" / "alpaca"
    for shard in range(6):
        write_rows(raw / f"part_{shard}", sample_rows("alpaca", 1500), (".jsonl", ".json.gz", ".jsonl.zst")[shard % 3])
    entry = str(root / "entrypoints" / "data" / "reformat_datasets.py")
    options = ["--raw_data_root", str(tmp_path / "raw"), "--workers", str(workers), "--save_path"]
    command = [sys.executable, "-c", DRIVER, entry, *options]
    subprocess.run([*command, str(tmp_path / "calm")], check=True, capture_output=True)
    draw, folder, killed = random.Random(workers), tmp_path / "killed" / "alpaca", 0
    for _ in range(4):
        process = subprocess.Popen(
            [*command, str(folder.parent), "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        begun = len(list(folder.glob(".partial/*.state")))
        while process.poll() is None and len(list(folder.glob(".partial/*.state"))) in (0, begun):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (folder / "data.jsonl").exists():
            assert (folder / "data.jsonl").read_bytes() == (tmp_path / "calm" / "alpaca" / "data.jsonl").read_bytes()
            break
    assert killed
    subprocess.run([*command, str(folder.parent), "--resume"], check=True, capture_output=True)
    assert contents(folder) == contents(tmp_path / "calm" / "alpaca")
    assert not (folder / ".partial").exists()


def test_workers_do_not_show(tmp_path: Path, monkeypatch, convert):
    """Any number of workers, stretches of any size, and files whose rows cannot be counted, which are done again."""
    rows = sample_rows("vicuna_sharegpt", 120)
    rows[5]["conversations"] = [{"id": "x", "from": "human", "value": "q"}, {"id": "y", "from": "gpt", "value": "a"}]
    for raw, ending, indent in (("plain", ".jsonl", None), ("array", ".json", 2), ("packed", ".jsonl.gz", None)):
        folder = tmp_path / raw
        for shard in range(3):
            write_rows(folder / f"part_{shard}", rows[40 * shard :][:40], ending, indent)
        blank = folder / f"part_1{ending}"
        if raw == "plain":
            blank.write_bytes(blank.read_bytes().replace(b"\n", b"\n\n", 3))
        wanted = contents(convert("vicuna_sharegpt", folder, tmp_path / f"{raw}_1"))
        assert contents(convert("vicuna_sharegpt", folder, tmp_path / f"{raw}_2", workers=2)) == wanted
        for size in (1, 700, 5000):
            monkeypatch.setattr(planning, "UNIT_BYTES", size)
            in_threads(monkeypatch)
            assert contents(convert("vicuna_sharegpt", folder, tmp_path / f"{raw}_{size}", workers=3)) == wanted
            monkeypatch.undo()


@pytest.mark.parametrize("copied", [0, 10])
def test_parts_are_joined_where_the_system_does_not_copy(copied: int, tmp_path: Path, monkeypatch, convert):
    """Files that it refuses to copy between, at once or after some bytes."""
    raw = write_rows(tmp_path / "rows", sample_rows("alpaca", 200), ".jsonl")
    wanted = contents(convert("alpaca", raw, tmp_path / "one"))
    monkeypatch.setattr(planning, "UNIT_BYTES", 5000)
    in_threads(monkeypatch)
    copy, calls = os.copy_file_range, []

    def refused(source: int, target: int, count: int) -> int:
        calls.append(count)
        if not copied or len(calls) % 2 == 0:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return copy(source, target, copied)

    monkeypatch.setattr(os, "copy_file_range", refused)
    assert contents(convert("alpaca", raw, tmp_path / "many", workers=2)) == wanted
    assert len(calls) > 4
