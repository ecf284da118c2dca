"""The two readers of JSON text: they read what others read, cut up anyhow, and nothing damaged in silence."""

from __future__ import annotations

import io
import json

import ijson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_tuning.data import array, lines
from router_tuning.data.array import ArrayReader, separator_of
from router_tuning.data.blocks import Place, Unreadable
from router_tuning.data.lines import line_blocks
from router_tuning.errors import UserError

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
