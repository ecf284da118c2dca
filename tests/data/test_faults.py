"""Damaged input: one clear line or a counted reject, and nothing half-written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import xxhash
from raw_data import GOOD, NO_LIMIT, in_threads, outcome_of, published_files, read_jsonl, sample_rows, write_rows

from router_tuning.data.reformat import Settings, reformat
from router_tuning.data.sources import source_of


@pytest.mark.parametrize("ending", [".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet", ".arrow", ".json"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("workers", [1, 2])
def test_truncated_files(ending: str, share: float, workers: int, tmp_path: Path, monkeypatch):
    path = write_rows(tmp_path / "rows", sample_rows("alpaca", 400), ending)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    in_threads(monkeypatch)
    outcome = outcome_of("alpaca", path, tmp_path / "out", workers=workers)
    assert outcome.error and path.name in outcome.error and "\n" not in outcome.error
    assert published_files(tmp_path / "out") == set()


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_damage_inside_a_file(ending: str, tmp_path: Path):
    path = write_rows(tmp_path / "rows", sample_rows("alpaca", 400), ending)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3 : len(whole) // 3 + 40] = bytes(40)
    path.write_bytes(whole)
    outcome = outcome_of("alpaca", path, tmp_path / "out")
    assert outcome.error and path.name in outcome.error
    assert published_files(tmp_path / "out") <= {"rejects.jsonl"}


def test_something_behind_packed_data(tmp_path: Path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b"\n") + b"garbage")
    outcome = outcome_of("alpaca", path, tmp_path / "out")
    assert "damaged" in outcome.error


def test_several_members_are_one_file(tmp_path: Path, convert):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b"\n") + gzip.compress(GOOD + b"\n"))
    assert len(read_jsonl(convert("alpaca", path) / "data.jsonl")) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (GOOD[: len(GOOD) // 2], "not_json"),
        (GOOD + GOOD, "not_json"),
        (GOOD.replace(b"plain", b"pl\x00in"), "not_json"),
        (b"\x00" * 30, "not_json"),
        (GOOD.replace(b"plain", b"pl\xffin"), "invalid_utf8"),
        (GOOD.replace(b"plain", b"pl\xed\xa0\x80in"), "invalid_utf8"),
        (GOOD.replace(b"plain", b"pl\\ud83din"), "lone_surrogate"),
        (b"[" * 100_000, "not_json"),
        (b"[1, 2]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"17", "not_an_object"),
        (b"{}", "missing_field"),
    ],
)
def test_bad_lines_are_counted_with_their_place(line: bytes, reason: str, tmp_path: Path, convert):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n" + line)
    folder = convert("alpaca", path, **NO_LIMIT)
    assert [row["id"] for row in read_jsonl(folder / "data.jsonl")] == ["alpaca_0", "alpaca_2"]
    rejects = read_jsonl(folder / "rejects.jsonl")
    assert [(row["id"], row["file"], row["line"], row["reason"]) for row in rejects] == [
        ("alpaca_1", "rows.jsonl", 3, reason),
        ("alpaca_3", "rows.jsonl", 5, reason),
    ]
    report = json.loads((folder / "reformat.json").read_text())
    assert report["rows"] == 4 and report["accepted"] == 2 and report["left_out"] == {reason: 2}
    digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert report["sources"] == [{"file": "rows.jsonl", "bytes": path.stat().st_size, "xxh3_128": digest}]


def test_a_bad_first_line_that_looks_like_an_array(tmp_path: Path, convert):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[1, 2]\n" + GOOD + b"\n\n[]\n")
    folder = convert("alpaca", path, **NO_LIMIT)
    assert [row["id"] for row in read_jsonl(folder / "data.jsonl")] == ["alpaca_1"]
    rejects = [(row["line"], row["reason"]) for row in read_jsonl(folder / "rejects.jsonl")]
    assert rejects == [(1, "not_an_object"), (4, "not_an_object")]


def test_bad_elements_of_an_array_are_counted_with_their_line(tmp_path: Path, convert):
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + b",\n".join([GOOD, b"5", GOOD.replace(b"plain", b"pl\xffin"), b"null", GOOD]) + b"\n]")
    folder = convert("alpaca", path, **NO_LIMIT)
    assert [row["id"] for row in read_jsonl(folder / "data.jsonl")] == ["alpaca_0", "alpaca_4"]
    rejects = [(row["line"], row["reason"]) for row in read_jsonl(folder / "rejects.jsonl")]
    assert rejects == [(3, "not_an_object"), (4, "invalid_utf8"), (5, "not_an_object")]


def test_numbers_beyond_the_standard_are_no_fault(tmp_path: Path, convert):
    row = GOOD[:-1]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row + b', "w": NaN}\n' + row + b', "w": ' + b"9" * 40 + b"}\n" + row + b', "w": "\\ud800"}\n')
    assert len(read_jsonl(convert("alpaca", path) / "data.jsonl")) == 3


def test_rejects_show_the_row(tmp_path: Path, convert):
    path = tmp_path / "rows.jsonl"
    deep = b'{"instruction": "i", "x": ' + b"[" * 300 + b"]" * 300 + b"}"
    path.write_bytes(b"\n".join([GOOD, b'{"instruction": 5}', b'{"instruction": "\\ud800"}', b"\xff{", deep]))
    rejects = read_jsonl(convert("alpaca", path, **NO_LIMIT) / "rejects.jsonl")
    assert rejects[0]["row"] == {"instruction": 5}
    assert json.loads(rejects[1]["text"]) == {"instruction": "\ud800"}
    assert rejects[2]["text"] == "\\xff{"
    assert json.loads(rejects[3]["text"])["instruction"] == "i"


def test_empty_and_missing_input(tmp_path: Path):
    for name, content in (("empty.jsonl", b""), ("array.json", b"[]"), ("blank.json", b" \n"), ("none.json.gz", b"")):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        outcome = outcome_of("alpaca", path, tmp_path / "out")
        assert outcome.error and ("no row" in outcome.error or "empty" in outcome.error)
        assert "data.jsonl" not in published_files(tmp_path / "out")


def test_nothing_accepted_is_an_error(tmp_path: Path):
    path = write_rows(tmp_path / "rows", [{"instruction": "i", "output": " "}] * 3, ".jsonl")
    outcome = outcome_of("alpaca", path, tmp_path / "out", **NO_LIMIT)
    assert "none of 3 rows" in outcome.error and published_files(tmp_path / "out") == {"rejects.jsonl"}


def test_limits(tmp_path: Path):
    """One faulty row in 100 is borne by default, two are not; blank turns are no faults; --strict bears nothing."""
    rows = sample_rows("alpaca", 100)
    rows[7] = {"instruction": "i", "output": " "}
    path = write_rows(tmp_path / "rows", rows, ".jsonl")
    assert outcome_of("alpaca", path, tmp_path / "a").error is None
    assert outcome_of("alpaca", path, tmp_path / "b", strict=True).too_many
    rows[8] = {"instruction": 3}
    write_rows(tmp_path / "rows", rows, ".jsonl")
    outcome = outcome_of("alpaca", path, tmp_path / "c")
    assert outcome.error is None and (outcome.filtered, outcome.refused, outcome.accepted) == (1, 1, 98)
    rows[9] = {"instruction": "i"}
    write_rows(tmp_path / "rows", rows, ".jsonl")
    outcome = outcome_of("alpaca", path, tmp_path / "d")
    assert outcome.too_many and "2 of 100" in outcome.error and "--max_reject_rate 0.01" in outcome.error
    assert published_files(tmp_path / "d") == {"rejects.jsonl"}
    outcome = outcome_of("alpaca", path, tmp_path / "d", resume=True, max_reject_rate=0.02)
    assert outcome.error is None and published_files(tmp_path / "d") == {
        "data.jsonl",
        "rejects.jsonl",
        "reformat.json",
    }


def test_a_failed_set_does_not_hold_up_the_others(tmp_path: Path):
    bad = tmp_path / "bad.json"
    bad.write_text('[{"query": "q"')
    good = write_rows(tmp_path / "good", sample_rows("alpaca", 10), ".jsonl")
    sources = [source_of("meta_math_qa", bad), source_of("alpaca", good)]
    first, second = reformat(sources, tmp_path / "out", Settings())
    assert "bad.json:1" in first.error and second.error is None
    assert read_jsonl(tmp_path / "out" / "alpaca" / "data.jsonl")


def test_an_earlier_result_outlives_a_failed_run(tmp_path: Path, convert):
    path = write_rows(tmp_path / "rows", sample_rows("alpaca", 10), ".json")
    folder = convert("alpaca", path)
    before = (folder / "data.jsonl").read_bytes()
    path.write_bytes(path.read_bytes()[:-9])
    assert outcome_of("alpaca", path, folder.parent).error
    assert (folder / "data.jsonl").read_bytes() == before


def test_settings_are_checked():
    for bad in ({"workers": 0}, {"max_reject_rate": 1.5}, {"max_reject_rate": -0.1}):
        with pytest.raises(ValueError, match=f"--{next(iter(bad))}"):
            Settings(**bad)
