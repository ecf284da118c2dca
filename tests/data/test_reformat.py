"""A run over data sets: one that fails does not touch the others, what is finished is kept, kills leave nothing."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from raw_data import (
    GOOD,
    NO_LIMIT,
    PUBLISHED,
    contents,
    files_in,
    outcome_of,
    raw_sets,
    read_jsonl,
    sample_rows,
    write_rows,
)

from router_tuning.data.formats import FORMATS
from router_tuning.data.reformat import Settings, reformat


@pytest.mark.parametrize("workers", [1, 7])
def test_the_files_do_not_depend_on_the_workers(workers, tmp_path, convert):
    places = raw_sets(tmp_path, 60, *FORMATS)
    outcomes = reformat(places, tmp_path / "out", Settings(workers))
    assert [outcome.name for outcome in outcomes] == list(FORMATS)
    for name, place in places.items():
        assert contents(tmp_path / "out" / name) == contents(convert(name, place))


def dies(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails(*_: object) -> None:
    raise LookupError("nobody has\nthought of it")


@pytest.mark.parametrize("workers", [1, 3])
def test_one_bad_data_set_does_not_take_the_others_with_it(workers, tmp_path, monkeypatch):
    """A damaged file, a place without files, an error that nobody has thought of, and the death of the process."""
    places = raw_sets(tmp_path, 10, *FORMATS)
    places["meta_math_qa"].write_text('[{"query": "q"')
    places["slim_orca"] = tmp_path / "nowhere"
    for name, convert in {"evol_instruct": dies, "vicuna_sharegpt": fails}.items():
        monkeypatch.setitem(FORMATS, name, replace(FORMATS[name], convert=convert))
    errors = {outcome.name: outcome.error for outcome in reformat(places, tmp_path / "out", Settings(workers))}
    assert "rows.jsonl:1: " in errors["meta_math_qa"] and "no file, no folder" in errors["slim_orca"]
    assert "exit code -9" in errors["evol_instruct"]
    assert errors["vicuna_sharegpt"] == "vicuna_sharegpt: LookupError: nobody has thought of it"
    for name in ("alpaca", "evol_code_alpaca"):
        assert errors[name] is None and len(read_jsonl(tmp_path / "out" / name / "data.jsonl")) == 10


def test_names_of_files_that_are_no_text(tmp_path, convert):
    (tmp_path / "rows").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "rows") + b"/\xff.jsonl")).write_bytes(b"{}\n" + GOOD)
    (reject,) = read_jsonl(convert("alpaca", tmp_path / "rows", **NO_LIMIT) / "rejects.jsonl")
    assert reject["file"] == "\\xff.jsonl"


def test_a_data_set_that_is_finished_is_kept(tmp_path, convert):
    """As long as its files are the same, and it is good enough for the settings of now."""
    rows = sample_rows("alpaca", 30)
    place = write_rows(tmp_path / "rows", [*rows, {"instruction": 3}], ".jsonl")

    def made(**settings: object) -> tuple[bool, str | None, list[int]]:
        outcome = outcome_of("alpaca", place, tmp_path / "out", **settings)
        folder = tmp_path / "out" / "alpaca"
        return outcome.resumed, outcome.error, [(folder / name).stat().st_mtime_ns for name in PUBLISHED]

    first = made(**NO_LIMIT)
    assert first[:2] == (False, None)
    again = made(resume=True, **NO_LIMIT)
    assert again == (True, None, first[2])
    os.utime(place)
    assert made(resume=True, **NO_LIMIT) == again
    kept, error, times = made(resume=True)
    assert kept and "1 of 31 rows are refused" in error and times == first[2]
    assert made(**NO_LIMIT)[2] != first[2]
    place.write_bytes(place.read_bytes().replace(b"plain", b"PLAIN"))
    assert made(resume=True, **NO_LIMIT)[0] is False
    assert b"PLAIN" in (tmp_path / "out" / "alpaca" / "data.jsonl").read_bytes()


@pytest.mark.parametrize("damage", ["missing data", "short data", "no report", "half a report", "another version"])
def test_what_is_not_whole_is_made_again(damage, tmp_path, convert):
    place = write_rows(tmp_path / "rows", sample_rows("alpaca", 30), ".jsonl")
    folder = convert("alpaca", place)
    before, report = contents(folder), folder / "reformat.json"
    if "data" in damage:
        os.truncate(folder / "data.jsonl", 100) if damage == "short data" else (folder / "data.jsonl").unlink()
    elif damage == "no report":
        report.unlink()
    else:
        text = report.read_text()
        report.write_text(text[:-9] if "half" in damage else text.replace('"version": ', '"version": 9'))
    assert not outcome_of("alpaca", place, folder.parent, resume=True).resumed
    assert contents(folder) == before


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.full), 2])
def test_kill_9_at_random_points(workers, tmp_path, root):
    """No file is there in part, and the run that comes after makes what an undisturbed one does, and no more."""
    names = ("alpaca", "meta_math_qa", "evol_code_alpaca")
    for name in names:
        write_rows(tmp_path / "raw" / name / "rows", sample_rows(name, 9000), ".json")
    command = [sys.executable, str(root / "entrypoints" / "data" / "reformat_datasets.py"), "--workers", str(workers)]
    command += ["--raw_data_root", str(tmp_path / "raw"), "--resume", "--save_path"]
    subprocess.run([*command, str(tmp_path / "calm")], check=True, capture_output=True)
    draw, out, killed = random.Random(workers), tmp_path / "killed", 0
    calm = {name: contents(tmp_path / "calm" / name) for name in names}
    for attempt in range(5):
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = time.monotonic()
        while process.poll() is None and not list(out.glob("*/.partial.*")) and time.monotonic() < begun + 20:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05 * attempt)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        for name in names:
            for path, wanted in zip(PUBLISHED, calm[name], strict=True):
                found = out / name / path
                assert not found.exists() or found.read_bytes() == wanted
    assert killed
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert {name: contents(out / name) for name in names} == calm
    assert files_in(out) == set(PUBLISHED)


@pytest.mark.parametrize("entry", ["reformat_datasets.py", "mix_datasets.py"])
def test_no_more_room_for_a_file(entry, tmp_path, command, convert, full_disk, capsys):
    """The system refuses to let a file grow, as on a full disk; the command says so and leaves nothing."""
    path = write_rows(tmp_path / "raw" / "alpaca", sample_rows("alpaca", 3000), ".json")
    convert("alpaca", path, tmp_path / "whole")
    others = [f"{name}=0" for name in FORMATS if name != "alpaca"]
    options = {
        "reformat_datasets.py": ["--raw_data_root", tmp_path / "raw"],
        "mix_datasets.py": ["--reformatted_dir", tmp_path / "whole", "--portion", "alpaca=1", *others],
    }[entry]
    with full_disk(100_000):
        assert command(f"data/{entry}", *options, "--save_path", tmp_path / "out") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and os.strerror(errno.EFBIG) in error
    assert files_in(tmp_path / "out") == set()
