"""Rows and files with faults: a counted reject with its place, or one clear line, and nothing half-written."""

import json
import re
from collections import Counter

import pytest
import xxhash
from raw_data import GOOD, NO_LIMIT, files_in, outcome_of, read_jsonl, sample_rows, write_rows

from router_tuning.data import reformat


@pytest.mark.parametrize("ending", [".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet", ".arrow", ".json"])
@pytest.mark.parametrize("damage", ["cut at 0.3", "cut at 0.9", "cut at 0.999", "zeros"])
def test_damaged_files(ending, damage, tmp_path):
    path = write_rows(tmp_path / "rows", sample_rows("alpaca", 400), ending)
    whole = path.read_bytes()
    if damage == "zeros":
        at = len(whole) // 3
        whole = whole[:at] + bytes(2000 if ending == ".arrow" else 40) + whole[at + 40 :]
    else:
        whole = whole[: int(float(damage.split()[-1]) * len(whole))]
    path.write_bytes(whole)
    outcome = outcome_of("alpaca", path, tmp_path / "out", **NO_LIMIT)
    if damage == "zeros" and ending == ".json":
        assert outcome.refused == 1, "control characters hide nothing"
    else:
        assert outcome.error and path.name in outcome.error and "\n" not in outcome.error
        assert files_in(tmp_path / "out") <= {"rejects.jsonl"}


BAD = {
    "not_json": [GOOD[:20], GOOD + GOOD, GOOD.replace(b"plain", b"pl\x00in"), b"\x00" * 30, b"[" * 100_000],
    "invalid_utf8": [GOOD.replace(b"plain", odd) for odd in (b"pl\xffin", b"pl\xed\xa0\x80in")],
    "lone_surrogate": [GOOD.replace(b"plain", b"pl\\ud83din")],
    "not_an_object": [b"[1, 2]", b"null", b'"text"', b"17"],
    "missing_field": [b"{}"],
}


def test_bad_lines_are_counted_with_their_place(tmp_path, convert):
    """The first of them looks like an array; there are blank lines, and the last line has no end."""
    bad = [("not_an_object", b"[1, 2]"), *((reason, line) for reason, lines in BAD.items() for line in lines)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n\n".join(line + b"\n" + GOOD for _, line in bad))
    folder = convert("alpaca", path, **NO_LIMIT)
    assert [row["id"] for row in read_jsonl(folder / "data.jsonl")] == [f"alpaca_{2 * n + 1}" for n in range(len(bad))]
    rejects = read_jsonl(folder / "rejects.jsonl")
    assert [(row["id"], row["file"], row["line"], row["reason"]) for row in rejects] == [
        (f"alpaca_{2 * number}", "rows.jsonl", 3 * number + 1, reason) for number, (reason, _) in enumerate(bad)
    ]
    report = json.loads((folder / "reformat.json").read_text())
    assert report["rows"] == 2 * report["accepted"] == 2 * len(bad)
    assert report["left_out"] == Counter(reason for reason, _ in bad)
    digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert report["sources"] == [{"file": "rows.jsonl", "bytes": path.stat().st_size, "xxh3_128": digest}]


@pytest.mark.parametrize("line", [GOOD[:-9], GOOD + GOOD, b"", GOOD.replace(b": ", b" "), b'{"a": "\\x"}'])
def test_an_array_that_is_no_json_is_one_line_with_its_place(line, tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b"[\n" + b",\n".join([GOOD, line, GOOD]) + b"\n]")
    assert "rows.json:3: " in outcome_of("alpaca", path, tmp_path / "out").error
    assert files_in(tmp_path / "out") == set()


def test_rejects_show_the_row(tmp_path, convert, monkeypatch):
    path = tmp_path / "rows.jsonl"
    deep = b'{"instruction": "i", "x": ' + b"[" * 300 + b"]" * 300 + b"}"
    odd = [b"NaN", b"9" * 40, b'"\\ud800"', b"[" * 900 + b"]" * 900, b'{"x": 1, "x": 2}']
    sound = [GOOD[:-1] + b', "w": ' + value + b"}" for value in odd]  # in a field that is not read it is no fault
    large = GOOD.replace(b"plain", b"long" * 300)
    monkeypatch.setattr(reformat, "MAX_ROW_BYTES", 1000)
    path.write_bytes(b"\n".join([*sound, b'{"instruction": 5}', b'{"instruction": "\\ud800"}', b"\xff{", deep, large]))
    folder = convert("alpaca", path, **NO_LIMIT)
    assert len(read_jsonl(folder / "data.jsonl")) == len(sound)
    rejects = read_jsonl(folder / "rejects.jsonl")
    assert rejects[4]["reason"] == "row_too_large"
    assert rejects[0]["row"] == {"instruction": 5}
    assert json.loads(rejects[1]["text"]) == {"instruction": "\ud800"}
    assert rejects[2]["text"] == "\\xff{"
    assert json.loads(rejects[3]["text"])["instruction"] == "i"


def test_limits(tmp_path):
    """One faulty row in 100 is borne by default, two are not; blank turns are no faults; --strict bears nothing."""

    def outcome(faulty: int, **settings: object):
        rows = sample_rows("alpaca", 100)
        rows[7] = {"instruction": "i", "output": " "}
        rows[8 : 8 + faulty] = [{"instruction": 3}] * faulty
        write_rows(tmp_path / "rows", rows, ".jsonl")
        return outcome_of("alpaca", tmp_path / "rows.jsonl", tmp_path / "out", **settings)

    borne = outcome(1)
    assert borne.error is None and (borne.filtered, borne.refused, borne.accepted) == (1, 1, 98)
    data = (tmp_path / "out" / "alpaca" / "data.jsonl").read_bytes()
    for faulty, settings, message in ((0, {"strict": True}, "1 of 100"), (2, {}, "2 of 100 .*--max_reject_rate 0.01")):
        left_out = outcome(faulty, **settings)
        assert left_out.too_many and re.search(message, left_out.error)
        assert (tmp_path / "out" / "alpaca" / "data.jsonl").read_bytes() == data, "an earlier result stays"
    assert outcome(2, max_reject_rate=0.02).error is None
    write_rows(tmp_path / "rows", [{"instruction": "i", "output": " "}] * 3, ".jsonl")
    nothing = outcome_of("alpaca", tmp_path / "rows.jsonl", tmp_path / "new")
    assert "none of 3 rows" in nothing.error and files_in(tmp_path / "new") == {"rejects.jsonl"}
