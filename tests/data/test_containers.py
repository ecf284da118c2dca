"""Every container gives the same rows; what a file is follows from its content."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import read_jsonl, sample_rows, write_rows

from router_tuning.data.blocks import Place, Unreadable
from router_tuning.data.containers import read_blocks, recognise
from router_tuning.errors import UserError

ENDINGS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet", ".arrow")
COLUMNS = ("conversations", "query", "response", "instruction", "input", "output")


def rows_of(path: Path) -> list[object]:
    return [row for block in read_blocks(recognise(path), COLUMNS) for row in block.rows]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["alpaca", "vicuna_sharegpt"])
def test_each_container_gives_the_same_file(name: str, ending: str, convert, tmp_path: Path):
    rows = sample_rows(name, 50)
    plain = convert(name, write_rows(tmp_path / "a" / "rows", rows, ".jsonl"), tmp_path / "plain")
    other = convert(name, write_rows(tmp_path / "b" / "rows", rows, ending), tmp_path / "other")
    assert (other / "data.jsonl").read_bytes() == (plain / "data.jsonl").read_bytes()
    assert len(read_jsonl(other / "data.jsonl")) == 50


@pytest.mark.parametrize("indent", [None, 0, 2, 4])
def test_array_styles(indent: int | None, tmp_path: Path):
    rows = sample_rows("slim_orca", 30)
    assert rows_of(write_rows(tmp_path / "rows", rows, ".json", indent)) == rows


def test_content_decides_not_the_name(tmp_path: Path):
    rows = sample_rows("alpaca", 5)
    for ending in ENDINGS:
        source = write_rows(tmp_path / "rows", rows, ending)
        for other in ("x.json", "x.jsonl", "x.gz", "x.txt"):
            path = tmp_path / other
            path.write_bytes(source.read_bytes())
            assert [dict(row) for row in rows_of(path)] == rows


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_byte_order_mark_line_ends_and_blank_lines(ending: str, tmp_path: Path):
    rows = sample_rows("alpaca", 6)
    path = write_rows(tmp_path / "rows", rows, ending, indent=2)
    text = path.read_text(encoding="utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert rows_of(path) == rows
    path.write_bytes(b"\n \r\n" + text.replace("\n", "\n\n").encode() + b"\n\n \t\n")
    assert rows_of(path) == rows
    path.write_bytes(text.encode().rstrip(b"\n"))
    assert rows_of(path) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \r\n\t", "is empty"),
        (b" " * (1 << 21), "white space"),
        ('[{"a": 1}]'.encode("utf-16"), "UTF-16"),
        (gzip.compress(b"", mtime=0), "is empty"),
    ],
)
def test_files_that_hold_no_rows(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        recognise(path)


def test_packed_tables_are_named(tmp_path: Path):
    path = write_rows(tmp_path / "rows", sample_rows("alpaca", 3), ".parquet")
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match="compressed parquet"):
        recognise(path)


def test_arrow_files_of_both_kinds_and_their_resumption(tmp_path: Path):
    table = pa.Table.from_pylist(sample_rows("meta_math_qa", 23))
    path = tmp_path / "file.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    wanted = table.select(["query", "response"]).to_pylist()
    assert rows_of(path) == wanted
    for start in (0, 3, 4, 22):
        got = [row for block in read_blocks(recognise(path), COLUMNS, Place(start, start)) for row in block.rows]
        assert got == wanted[start:]


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 7), (5, 9), (7, 21), (22, None), (13, 14)])
def test_stretches_of_a_table(start: int, stop: int | None, tmp_path: Path):
    rows = [{"query": f"q{number}"} for number in range(23)]
    container = recognise(write_rows(tmp_path / "rows", rows, ".parquet"))
    blocks = list(read_blocks(container, COLUMNS, Place(start, start), stop))
    assert [row for block in blocks for row in block.rows] == rows[start:stop]
    assert [block.line_of(number) for block in blocks for number in range(len(block.rows))] == list(
        range(start + 1, (stop or 23) + 1)
    )


def test_table_without_the_columns_and_with_bad_text(tmp_path: Path):
    path = write_rows(tmp_path / "other", [{"x": 1}, {"x": 2}], ".parquet")
    assert rows_of(path) == [{}, {}]
    raw = pa.array([b"good", b"b\xff"]).cast(pa.binary())
    bad = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"query": bad, "response": ["a", "b"]}), tmp_path / "bad.parquet")
    first, second = rows_of(tmp_path / "bad.parquet")
    assert first == {"query": "good", "response": "a"}
    assert isinstance(second, Unreadable) and second.reason == "invalid_utf8"
