"""Stretches of a data set side by side: who works on them, and how they are cut, does not show in the files."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from raw_data import contents, in_threads, outcome_of, sample_rows, write_rows

from router_tuning.data import conversion, pieces, planning
from router_tuning.data.blocks import BOM
from router_tuning.data.reformat import Settings, reformat
from router_tuning.data.sources import source_of
from router_tuning.data.writing import WriteError


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
        for size in (1, 700, 5000, 10**9):
            monkeypatch.setattr(planning, "STRETCH_BYTES", size)
            assert contents(convert("vicuna_sharegpt", folder, tmp_path / f"{raw}_2_{size}", workers=2)) == wanted
            in_threads(monkeypatch)
            monkeypatch.setattr(pieces, "WRITE_BYTES", 400)
            monkeypatch.setattr(pieces, "HELD_BYTES", 1000)
            assert contents(convert("vicuna_sharegpt", folder, tmp_path / f"{raw}_{size}", workers=3)) == wanted
            monkeypatch.undo()


LAYOUTS = {
    "lines": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "blank lines in the middle": lambda rows: LAYOUTS["lines"](rows).replace(b"\n", b"\n \r\n\n", 30)[3:],
    "CRLF": lambda rows: LAYOUTS["lines"](rows).replace(b"\n", b"\r\n"),
    "BOM": lambda rows: BOM + LAYOUTS["lines"](rows),
    "no newline at the end": lambda rows: LAYOUTS["lines"](rows)[:-1],
    "array": lambda rows: json.dumps(rows).encode(),
    "array over lines": lambda rows: json.dumps(rows, indent=1).encode() + b"\n",
    "array with other elements": lambda rows: json.dumps([*rows[:50], 7, None, *rows[50:]]).encode(),
    "broken rows": lambda rows: LAYOUTS["lines"](rows).replace(b"output", b"outp\xff", 20).replace(b'"}', b'"', 9),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 97, 1000, 4099, 20_000])
def test_stretches_of_odd_sizes(layout: str, size: int, tmp_path: Path, monkeypatch, convert):
    """Two processes make the bytes that one worker makes, also of rows that are larger than a stretch."""
    rows = sample_rows("alpaca", 60 if size == 1 else 300)
    rows[20]["output"] = "long " * 3000
    rows[30]["output"] = " "
    path = tmp_path / "rows.json"
    path.write_bytes(LAYOUTS[layout](rows))
    wanted = contents(convert("alpaca", path, tmp_path / "one", max_reject_rate=1))
    monkeypatch.setattr(planning, "STRETCH_BYTES", size)
    assert contents(convert("alpaca", path, tmp_path / "alone", max_reject_rate=1)) == wanted
    assert contents(convert("alpaca", path, tmp_path / "two", max_reject_rate=1, workers=2)) == wanted


@pytest.mark.parametrize("workers", [2, 3])
def test_nobody_waits_for_a_stretch_that_failed(workers: int, tmp_path: Path, monkeypatch):
    """What lies behind it is given up, the other data set goes on."""
    monkeypatch.setattr(planning, "STRETCH_BYTES", 500)
    in_threads(monkeypatch)
    converting = conversion.convert_block

    def failing(known, block, first, *rest):
        if known.name == "alpaca" and first > 30:
            time.sleep(0.05)  # so that the others wait
            raise WriteError("the disk is gone")
        return converting(known, block, first, *rest)

    monkeypatch.setattr(conversion, "convert_block", failing)
    sources = [
        source_of(name, write_rows(tmp_path / name, sample_rows(name, 200), ".jsonl"))
        for name in ("alpaca", "meta_math_qa")
    ]
    failed, done = reformat(sources, tmp_path / "out", Settings(workers))
    assert failed.error == "the disk is gone" and done.error is None and done.accepted == 200
    monkeypatch.setattr(conversion, "convert_block", converting)
    assert outcome_of("alpaca", sources[0].files[0], tmp_path / "out", resume=True, workers=workers).accepted == 200


def test_a_worker_that_dies_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "STRETCH_BYTES", 500)
    monkeypatch.setattr(conversion, "convert_block", lambda *_: os._exit(9))
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # forked, or it would not have that function
    path = write_rows(tmp_path / "rows", sample_rows("alpaca", 200), ".jsonl")
    outcome = outcome_of("alpaca", path, tmp_path / "out", workers=2)
    assert "a worker died" in outcome.error and "--resume" in outcome.error
