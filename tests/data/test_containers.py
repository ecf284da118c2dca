"""Files of rows: what one is follows from its content, and a row is the same row in every container."""

import bz2
import gzip
import lzma
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import NO_LIMIT, outcome_of, read_jsonl, sample_rows, write_rows, zstd
from refused import refused

from router_tuning.data.acceptance import Reject
from router_tuning.data.containers import recognise
from router_tuning.errors import UserError

ENDINGS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet", ".arrow")
COLUMNS = ("conversations", "query", "response", "instruction", "input", "output")


def rows_of(path: Path) -> list[object]:
    return [row for _, row in recognise(path).rows(COLUMNS)]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read_columns(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key in COLUMNS} for row in rows]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["alpaca", "vicuna_sharegpt"])
def test_content_decides_not_the_name(name, ending, tmp_path):
    rows = sample_rows(name, 50)
    data = write_rows(tmp_path / "rows", rows, ending).read_bytes()
    for other in ("x.json", "x.gz", "x.txt"):
        assert read_columns(rows_of(written(tmp_path / other, data))) == read_columns(rows)


@pytest.mark.parametrize("layout", ["array", "array in lines", "lines", "spread"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n \t\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\n \r\n"])
def test_layouts_line_ends_and_byte_order_marks(layout, end, mark, tmp_path):
    rows = sample_rows("alpaca", 6)
    ending, indent = {"array": (".json", 2), "array in lines": (".json", 0)}.get(layout, (".jsonl", None))
    text = write_rows(tmp_path / "rows", rows, ending, indent).read_text()
    if layout == "spread":
        text = text.replace('{"', '{\n "').replace(', "', ',\n "')
    path = written(tmp_path / "odd", mark + text.replace("\n", end).encode())
    assert rows_of(path) == rows
    assert rows_of(written(path, path.read_bytes().rstrip())) == rows


SKIPPED = struct.pack("<II", 0x184D2A53, 5) + b"pzstd"


@pytest.mark.parametrize(
    "pack",
    [
        lambda half, rest: gzip.compress(half) + gzip.compress(rest) + bytes(20),
        lambda half, rest: zstd(half) + zstd(rest),
        lambda half, rest: SKIPPED + zstd(half) + SKIPPED + zstd(b"") + zstd(rest) + SKIPPED,
    ],
    ids=["gzip members and padding", "zstd frames", "zstd frames to skip"],
)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_packed_in_several_parts(pack, ending, tmp_path):
    rows = sample_rows("alpaca", 9)
    data = write_rows(tmp_path / "rows", rows, ending).read_bytes()
    assert rows_of(written(tmp_path / "packed", pack(data[:200], data[200:]))) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \r\n\t", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (SKIPPED, "is empty"),
        (b" " * (1 << 21), "white space"),
        ('[{"a": 1}]'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}\n'.encode("utf-16-le"), "UTF-16"),
        ("\n[1]".encode("utf-16-be"), "UTF-16"),
        (gzip.compress(b"PAR1", mtime=0), "compressed parquet"),
        (b"\xff\xff\xff\xff\x00", "damaged"),
        (gzip.compress(b"[]", mtime=0) + b"more", "damaged"),
        (zstd(b"[]") + b"more", "damaged"),
        (zstd(b"[]") + SKIPPED[:-1], "truncated"),
        (bz2.compress(b"[]"), "a bzip2 file"),
        (lzma.compress(b"[]"), "a xz file"),
        (b"PK\x03\x04[]", "a zip file"),
        (gzip.compress(bytes(257) + b"ustar", mtime=0), "a tar file"),
        (gzip.compress(zstd(b"[]"), mtime=0), "a doubly compressed file"),
    ],
)
def test_files_without_rows_are_one_line_that_names_them(content, message, tmp_path):
    with refused(f"^{tmp_path / 'rows.json'}.*{message}", UserError):
        rows_of(written(tmp_path / "rows.json", content))


def arrow_file(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return path


def parquet_file(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


TABLES = pytest.mark.parametrize("write", [arrow_file, parquet_file])
TURNS = [[{"from": "human", "value": "q"}, {"from": "gpt", "value": "é"}], []]
WORDS = ["q", None, "é"]


@TABLES
@pytest.mark.parametrize(
    ("values", "kind"),
    [
        *[(WORDS, kind) for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))],
        ([1, None, 3], pa.int64()),
        ([1.5, None], pa.float64()),
        (TURNS, pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))),
        (TURNS, pa.large_list(pa.struct({"from": pa.dictionary(pa.int8(), pa.string()), "value": pa.large_string()}))),
        ([[[["q"]]], None], pa.list_(pa.list_(pa.list_(pa.string())))),
        ([{"from": "gpt"}, None], pa.map_(pa.string(), pa.string())),
    ],
)
def test_types_of_columns(write, values, kind, tmp_path):
    array = pa.array([list(value.items()) if isinstance(value, dict) else value for value in values], kind)
    table = pa.table({"other": pa.nulls(len(values)), "query": array})
    assert rows_of(write(tmp_path / "rows", table)) == [{"query": value} for value in values]


@TABLES
def test_columns_that_are_absent_rows_across_batches_and_text_that_is_none(write, tmp_path):
    path, many = tmp_path / "rows", [{"query": f"q{number}"} for number in range(600)]
    assert rows_of(write(path, pa.table({"x": [1, 2]}))) == [{}, {}]
    assert rows_of(write(path, pa.table({"query": pa.array([], pa.string())}))) == []
    assert list(recognise(write(path, pa.Table.from_pylist(many))).rows(COLUMNS)) == list(enumerate(many, 1))
    raw = pa.array([b"good", b"b\xff"]).cast(pa.binary())
    bad = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    first, second = rows_of(write(path, pa.table({"query": bad, "response": ["a", "b"]})))
    assert first == {"query": "good", "response": "a"}
    assert isinstance(second, Reject) and second.reason == "invalid_utf8"


@TABLES
def test_names_that_mean_two_things(write, tmp_path):
    """An error if the columns that are read are not certain; others may be called what they like."""
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, ["query", "response", "response"])
    with refused("rows: 'response' is the name of two columns", UserError):
        rows_of(write(tmp_path / "rows", twice))
    beside = pa.Table.from_arrays([pa.array(["a"])] * 4, ["query", "more", "response", "more"])
    assert rows_of(write(tmp_path / "rows", beside)) == [{"query": "a", "response": "a"}]
    struct_type = pa.struct([("from", pa.string()), ("value", pa.string()), ("value", pa.string())])
    inside = pa.table({"conversations": pa.array([[("gpt", "a", "b")]], pa.list_(struct_type))})
    (row,) = rows_of(write(tmp_path / "rows", inside))
    assert row.reason == "wrong_type" and "duplicate" in row.detail


def row(**changed: object) -> dict:
    return {"instruction": "i", "input": "", "output": "o", **changed}


@pytest.mark.parametrize("ending", [*ENDINGS, ".spread"])
@pytest.mark.parametrize(
    ("odd", "reason", "shown"),
    [
        (row(), None, None),
        (row(input=None), None, None),
        (row(output="\x00 \u2028 🙂 \\u0041"), None, None),
        (row(input=float("nan")), "wrong_type", "NaN"),
        (row(input=float("inf")), "wrong_type", "Infinity"),
        (row(input=3), "wrong_type", None),
        (row(input=[["deep"]]), "wrong_type", None),
        (row(output=" \u2003"), "empty_turn", None),
        ({"instruction": "i", "input": ""}, "missing_field", None),
    ],
)
def test_a_row_is_accepted_or_refused_and_shown_for_what_it_is(odd, reason, shown, ending, tmp_path):
    """NaN is not null."""
    path = write_rows(tmp_path / "rows", [odd], ".json" if ending == ".spread" else ending, indent=1)
    if ending == ".spread":
        path.write_bytes(path.read_bytes().strip(b"[]"))
    outcome = outcome_of("alpaca", path, tmp_path / "out", **NO_LIMIT)
    assert outcome.reasons == ({reason: 1} if reason else {}), outcome.error
    if reason:
        (reject,) = read_jsonl(tmp_path / "out" / "alpaca" / "rejects.jsonl")
        assert f'"input": {shown}' in reject["text"] if shown else reject["row"] == odd
