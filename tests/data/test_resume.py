"""Whatever kills a run, resuming it gives the files that an undisturbed run gives."""

from __future__ import annotations

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
from raw_data import PUBLISHED, contents, outcome_of, sample_rows, write_rows

from router_tuning.data import conversion, lines, planning
from router_tuning.data.blocks import Place
from router_tuning.data.containers import recognise
from router_tuning.data.conversion import Task
from router_tuning.data.dataset_run import DatasetRun
from router_tuning.data.planning import Plan, Stretch
from router_tuning.data.progress import Progress
from router_tuning.data.reformat import Settings, reformat
from router_tuning.data.sources import source_of


class Killed(Exception):
    """Stands for the end of the process."""


def some_bad_rows(name: str, count: int) -> list[dict]:
    rows = sample_rows(name, count)
    rows[3::11] = [{"query": "no answer", "response": " "}] * len(rows[3::11])
    return rows


@settings(max_examples=200, deadline=None)
@example(ending=".parquet", checkpoint=1, whole=True, kills=[10], garbage=b"\x00").via("killed with all rows done")
@example(ending=".json", checkpoint=1, whole=True, kills=[3, 12, 12], garbage=b"").via("killed behind the array's end")
@given(
    ending=st.sampled_from([".json", ".jsonl", ".jsonl.gz", ".json.zst", ".parquet", ".arrow"]),
    checkpoint=st.integers(1, 3000),
    whole=st.booleans(),
    kills=st.lists(st.integers(0, 12), max_size=3),
    garbage=st.binary(max_size=50),
)
def test_a_run_killed_anywhere_ends_the_same(ending, checkpoint, whole, kills, garbage, tmp_path_factory):
    """Killed behind any block, with more in the files than the run has noted down."""
    base = tmp_path_factory.getbasetemp() / "killed"
    source = base / f"rows{ending}"
    if not source.exists():
        write_rows(base / "rows", some_bad_rows("meta_math_qa", 60), ending, indent=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "CHECKPOINT_BYTES", checkpoint)
        patch.setattr(planning, "STRETCH_BYTES", 10**9 if whole else 1500)
        patch.setattr(planning, "STRETCH_ROWS", 10**9 if whole else 10)
        patch.setattr(lines, "BLOCK_BYTES", 300)
        patch.setattr("router_tuning.data.array.BLOCK_BYTES", 300)
        patch.setattr("router_tuning.data.tables.BATCH_ROWS", 7)
        results = []
        for limits in ([], kills):
            shutil.rmtree(base / "out", ignore_errors=True)
            for limit in limits:
                kill_after(source, base / "out", limit)
                for kind in ("data.jsonl", "rejects.jsonl"):
                    with (base / "out" / "meta_math_qa" / ".partial" / kind).open("ab") as file:
                        file.write(garbage)
            (outcome,) = reformat([source_of("meta_math_qa", source)], base / "out", Settings(1, True, 1.0))
            assert outcome.rows == 60 and outcome.reasons == {"empty_turn": 6}
            results.append(contents(base / "out" / "meta_math_qa"))
    assert results[0] == results[1]


def kill_after(source: Path, save_path: Path, blocks: int) -> None:
    """Convert until so many blocks are done."""
    left = [blocks]

    def convert_block(*arguments: object) -> tuple[bytes, bytes]:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return converting(*arguments)

    converting = conversion.convert_block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "convert_block", convert_block)
        patch.setattr(DatasetRun, "publish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            reformat([source_of("meta_math_qa", source)], save_path, Settings(1, True))


def test_resuming_reads_only_what_is_missing(tmp_path: Path, monkeypatch):
    """Of a stream behind its last checkpoint, of a file in stretches behind the last complete one."""
    monkeypatch.setattr(conversion, "CHECKPOINT_BYTES", 1)
    monkeypatch.setattr(planning, "STRETCH_BYTES", 1000)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 500)
    converting, rows = conversion.convert_block, []
    for ending in (".jsonl.gz", ".jsonl"):
        path = write_rows(tmp_path / "rows", sample_rows("meta_math_qa", 100), ending)
        kill_after(path, tmp_path / ending, 9)
        rows.clear()
        monkeypatch.setattr(conversion, "convert_block", lambda *task: rows.append(len(task[1])) or converting(*task))
        assert outcome_of("meta_math_qa", path, tmp_path / ending, resume=True).accepted == 100
        assert 20 < sum(rows) < 90
        monkeypatch.setattr(conversion, "convert_block", converting)


def test_output_that_is_lost_is_made_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "STRETCH_BYTES", 500)
    path = write_rows(tmp_path / "rows", sample_rows("meta_math_qa", 40), ".jsonl")
    container = recognise(path)
    partial = tmp_path / "out" / "meta_math_qa" / ".partial"
    for name, damage in (
        ("data.jsonl", Path.unlink),
        ("data.jsonl", lambda file: os.truncate(file, 10)),
        ("journal.jsonl", Path.unlink),
        ("journal.jsonl", lambda file: file.write_text("{}\n")),
        ("journal.jsonl", lambda file: file.write_text("[]\n")),
        ("plan.json", lambda file: file.write_text("{")),
    ):
        shutil.rmtree(partial, ignore_errors=True)
        kill_after(path, tmp_path / "out", 5)
        plan, states, _ = Progress(partial).load([container])
        assert 2 < len(states) < len(plan.stretches)
        damage(partial / name)
        assert Progress(partial).load([container]) is None
        assert outcome_of("meta_math_qa", path, tmp_path / "out", resume=True).accepted == 40
        shutil.rmtree(partial.parent)


def test_a_line_of_the_journal_that_was_cut_short_is_none(tmp_path: Path):
    path = write_rows(tmp_path / "rows", sample_rows("alpaca", 3), ".jsonl")
    container = recognise(path)
    progress = Progress(tmp_path / "partial")
    progress.begin(Plan([Stretch(container)] * 3))
    for rows in (1, 2):
        progress.add(conversion.State(Place(), rows))
    journal = tmp_path / "partial" / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-4])
    _, states, _ = progress.load([container])
    assert [state.rows for state in states] == [1]
    progress.add(conversion.State(Place(), 2))
    assert journal.read_bytes() == whole


def test_a_checkpoint_of_bytes_that_are_written_anew_is_forgotten(tmp_path: Path):
    """It was for the third stretch, when the second had not been noted down: what it says comes true a second time
    only when that stretch is as far again, and until then there may be gaps."""
    path = write_rows(tmp_path / "rows", sample_rows("alpaca", 3), ".jsonl")
    container = recognise(path)
    partial = tmp_path / "partial"
    progress = Progress(partial)
    progress.begin(Plan([Stretch(container)] * 3))
    task = Task("alpaca", Stretch(container), 2, partial, "rows", 0, 2)
    state = conversion.State(Place(5, 1), 1, 10)
    progress.add(conversion.State(Place(), 1))
    (partial / "data.jsonl").write_bytes(bytes(100))
    conversion._save(task, state)
    assert progress.load([container])[2] is None
    progress.add(conversion.State(Place(), 1))
    assert progress.load([container])[2] is None
    (partial / "data.jsonl").write_bytes(bytes(100))
    conversion._save(task, state)
    assert progress.load([container])[2] == state and os.path.getsize(partial / "data.jsonl") == 10


def test_a_run_that_was_complete_is_left_alone(tmp_path: Path, convert):
    raw = write_rows(tmp_path / "raw" / "rows", sample_rows("alpaca", 30), ".jsonl")
    folder = convert("alpaca", raw)
    before = [(folder / name).stat().st_mtime_ns for name in PUBLISHED]
    (outcome,) = reformat([source_of("alpaca", raw)], folder.parent, Settings(resume=True))
    assert outcome.resumed and outcome.accepted == 30
    assert [(folder / name).stat().st_mtime_ns for name in PUBLISHED] == before
    time.sleep(0.01)
    write_rows(tmp_path / "raw" / "rows", sample_rows("alpaca", 31), ".jsonl")
    (outcome,) = reformat([source_of("alpaca", raw)], folder.parent, Settings(resume=True))
    assert not outcome.resumed and outcome.accepted == 31


def test_another_file_is_not_taken_for_the_one_begun(tmp_path: Path, monkeypatch, convert):
    monkeypatch.setattr(planning, "STRETCH_BYTES", 500)
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
import router_tuning.data.conversion, router_tuning.data.planning
router_tuning.data.conversion.CHECKPOINT_BYTES = 30_000
router_tuning.data.planning.STRETCH_BYTES = 30_000
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Workers that are forked have these sizes, too."""


@pytest.mark.parametrize("endings", [(".jsonl", ".json.gz", ".jsonl.zst"), (".jsonl", ".json")])
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_random_points(workers: int, endings: tuple[str, ...], tmp_path: Path, root: Path):
    raw = tmp_path / "raw" / "alpaca"
    for shard in range(6):
        write_rows(raw / f"part_{shard}", sample_rows("alpaca", 1500), endings[shard % len(endings)])
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
        begun = noted(folder)
        while process.poll() is None and noted(folder) in (0, begun):
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


def noted(folder: Path) -> int:
    """Bytes of the journal of a run."""
    journal = folder / ".partial" / "journal.jsonl"
    return journal.stat().st_size if journal.exists() else 0
