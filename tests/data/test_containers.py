"""Every container and layout gives the same rows; what a file is follows from its content."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import ijson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_data import read_jsonl, sample_rows, write_rows

from utils.data import array, lines
from utils.data.array import ArrayReader, separator_of
from utils.data.blocks import Place, Unreadable
from utils.data.containers import read_blocks, recognise
from utils.data.lines import line_blocks
from utils.data.sources import locate, source_of
from utils.errors import UserError

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
        (gzip.compress(b""), "is empty"),
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


def test_layouts_of_the_hub(tmp_path: Path, convert):
    """data/train-0000N-of-0000M.parquet beside other splits, a card and metadata; several shards keep their order."""
    rows = sample_rows("alpaca", 30)
    folder = tmp_path / "alpaca"
    for shard in range(3):
        write_rows(folder / "data" / f"train-0000{shard}-of-00003", rows[10 * shard :][:10], ".parquet")
    write_rows(folder / "data" / "test-00000-of-00001", sample_rows("alpaca", 3), ".parquet")
    (folder / "README.md").write_text("card")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    data = read_jsonl(convert("alpaca", folder) / "data.jsonl")
    assert [row["id"] for row in data] == [f"alpaca_{number}" for number in range(30)]
    assert [row["messages"][1]["content"] for row in data] == [row["output"] for row in rows]


def test_snapshot_of_a_hub_cache(tmp_path: Path):
    folder = tmp_path / "datasets--tatsu-lab--alpaca"
    for commit in ("aaa", "bbb"):
        write_rows(folder / "snapshots" / commit / "rows", sample_rows("alpaca", 1), ".json")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("bbb")
    assert [path.parent.name for path in source_of("alpaca", folder).files] == ["bbb"]


def test_published_name_wins_and_doubtful_folders_are_refused(tmp_path: Path):
    rows = sample_rows("vicuna_sharegpt", 2)
    folder = tmp_path / "vicuna_sharegpt"
    write_rows(folder / "HTML_cleaned_raw_dataset" / "part1", rows, ".json")
    write_rows(folder / "ShareGPT_V3_unfiltered_cleaned_split", rows, ".json")
    assert len(source_of("vicuna_sharegpt", folder).files) == 2
    exact = write_rows(folder / "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry", rows, ".json.gz")
    assert source_of("vicuna_sharegpt", folder).files == (exact,)
    write_rows(folder / "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry", rows, ".json")
    with pytest.raises(UserError, match="same data twice"):
        source_of("vicuna_sharegpt", folder)
    mixed = tmp_path / "mixed"
    write_rows(mixed / "a", rows, ".json")
    write_rows(mixed / "a", rows, ".parquet")
    with pytest.raises(UserError, match="json and parquet"):
        source_of("slim_orca", mixed)


def test_places_without_data(tmp_path: Path):
    for place, message in (
        (tmp_path, "no data file"),
        (tmp_path / "absent", "no file, no folder"),
        ("a/b/c", "no hub id"),
    ):
        with pytest.raises(UserError, match=message):
            source_of("alpaca", place)
    write_rows(tmp_path / "held" / "test", sample_rows("alpaca", 1), ".jsonl")
    with pytest.raises(UserError, match="only test or validation"):
        source_of("alpaca", tmp_path / "held")


def test_files_and_folders_under_the_root(tmp_path: Path):
    assert locate("alpaca", tmp_path) is None
    packed = write_rows(tmp_path / "alpaca", [], ".jsonl.zst")
    assert locate("alpaca", tmp_path) == packed
    (tmp_path / "alpaca").mkdir()
    assert locate("alpaca", tmp_path) == tmp_path / "alpaca"


def test_hub_ids_go_through_datasets(tmp_path: Path, monkeypatch, convert):
    """A local folder stands for the hub, which ``load_dataset`` reads in the same way."""
    import datasets

    rows = sample_rows("meta_math_qa", 20)
    write_rows(tmp_path / "meta-math" / "MetaMathQA" / "MetaMathQA-395K", rows, ".json")
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda hub_id, split: load(str(tmp_path / hub_id), split=split, cache_dir=str(tmp_path / "cache")),
    )
    folder = convert("meta_math_qa", "meta-math/MetaMathQA")
    assert [row["messages"][0]["content"] for row in read_jsonl(folder / "data.jsonl")] == [r["query"] for r in rows]
    with pytest.raises(UserError, match="nobody/nothing cannot be loaded from the hub"):
        source_of("meta_math_qa", "nobody/nothing")


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 99) | st.text(alphabet='ab}],{"\\:é\n x[', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["id", 'q"', "{", "é"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ARRAY = st.lists(st.fixed_dictionaries({"id": VALUE}) | VALUE, max_size=6)
STYLE = st.sampled_from([(None, None), (None, (",", ":")), (1, None), (0, (" , ", " : "))])


def array_rows(data: bytes) -> tuple[list[object], list[int]]:
    rows, numbers = [], []
    for block in ArrayReader(io.BytesIO(data), Place(), "rows", separator_of(data[:60])).blocks():
        rows += block.rows
        numbers += [block.line_of(number) for number in range(len(block.rows))]
    return rows, numbers


@settings(max_examples=1500, deadline=None)
@given(rows=ARRAY, style=STYLE, block=st.sampled_from([7, 64, 1 << 17]), tail=st.sampled_from(["", "\n", " \r\n "]))
def test_any_array_is_read_as_others_read_it(rows, style, block: int, tail: str):
    indent, separators = style
    data = (json.dumps(rows, indent=indent, separators=separators, ensure_ascii=False) + tail).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array, "BLOCK_BYTES", block)
        got, numbers = array_rows(data)
    assert got == rows == list(ijson.items(io.BytesIO(data), "item"))
    assert numbers == sorted(numbers) and all(1 <= number <= data.count(b"\n") + 1 for number in numbers)


@settings(max_examples=1500, deadline=None)
@given(
    rows=ARRAY,
    style=STYLE,
    place=st.floats(0, 1, exclude_max=True),
    byte=st.sampled_from([None, *b'",]}{[ a\x00\xff\xc3']),
    block=st.sampled_from([7, 64, 1 << 17]),
)
def test_no_damaged_array_is_read_in_silence(rows, style, place: float, byte: int | None, block: int):
    """Cut short, or with one byte changed: the rows are what ``json`` says, or some row is unreadable, or an error."""
    whole = bytearray(json.dumps(rows, indent=style[0], separators=style[1], ensure_ascii=False).encode())
    at = int(place * len(whole))
    damaged = bytes(whole[:at]) if byte is None else bytes(whole[:at]) + bytes([byte]) + bytes(whole[at + 1 :])
    try:
        wanted = json.loads(damaged.decode())
    except ValueError:
        wanted = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array, "BLOCK_BYTES", block)
        try:
            got, _ = array_rows(damaged)
        except UserError as error:
            assert not isinstance(wanted, list) and str(error).startswith("rows")
            return
    if isinstance(wanted, list):
        assert got == wanted
    else:
        assert any(isinstance(row, Unreadable) for row in got)


LINE = st.one_of(
    VALUE.map(lambda value: json.dumps(value, ensure_ascii=False).encode()),
    st.binary(max_size=6).map(lambda raw: raw.replace(b"\n", b"")),
    st.sampled_from([b"", b" ", b"{}", b'{"a":1},{}', b'{"a":[1', b"2]}", b'"\\ud800"', b"NaN", b"\x00", b"\xff"]),
)


@settings(max_examples=2500, deadline=None)
@given(
    content=st.lists(LINE, max_size=8),
    end=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
    block=st.sampled_from([3, 40, 1 << 17]),
)
def test_any_lines_are_read_one_by_one(content: list[bytes], end: bytes, last: bool, block: int):
    data = b"".join(line + end for line in content)
    data = data if last else data.removesuffix(end)
    wanted = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip(b" \t\r\n")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        blocks = list(line_blocks(io.BytesIO(data), Place(3)))
    got = [(block.line_of(number), row) for block in blocks for number, row in enumerate(block.rows)]
    assert [number for number, _ in got] == [number for number, _ in wanted]
    for (_, row), (_, line) in zip(got, wanted, strict=True):
        try:
            value = json.loads(line.decode())
        except ValueError:
            assert isinstance(row, Unreadable) and row.reason in ("not_json", "invalid_utf8") and row.detail
        else:
            assert row == value or (row != row and value != value)


def test_a_line_too_long_is_passed_over(monkeypatch):
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 16)
    long = json.dumps({"a": "x" * 500}).encode()
    for data in (b'{"a":1}\n' + long + b'\n{"a":2}\n', b'{"a":1}\n' + long, long + b"\n" + long + b'\n{"a":2}'):
        wanted = [json.loads(line) if len(line) < 100 else "row_too_large" for line in data.split(b"\n") if line]
        rows = [row for block in line_blocks(io.BytesIO(data), Place()) for row in block.rows]
        assert [getattr(row, "reason", row) for row in rows] == wanted
        after = [block.after for block in line_blocks(io.BytesIO(data), Place())][-1]
        assert after.offset == len(data)


def test_an_element_too_large_is_an_error_with_its_line(monkeypatch):
    monkeypatch.setattr(array, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(array, "BLOCK_BYTES", 16)
    data = json.dumps([{"a": 1}, {"a": "x" * 500}], indent=1).encode()
    with pytest.raises(UserError, match="rows:4: .* larger than"):
        array_rows(data)


def test_what_stands_behind_an_array_is_an_error():
    for tail in (b"{}", b"\n[]", b"]", b","):
        with pytest.raises(UserError, match="rows:"):
            array_rows(b'[{"id": 1}]' + tail)
