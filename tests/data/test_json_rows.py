"""Rows of JSON text: whatever the layout and the chunks, they are what ``json`` reads, and nothing else passes."""

import io
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_tuning.data import json_rows
from router_tuning.data.acceptance import Reject
from router_tuning.data.json_rows import element_rows, line_rows, parse
from router_tuning.errors import UserError

VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 99) | st.text(alphabet='ab}],{"\\:é\n x[\x00', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["id", 'q"', "{", "é"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ROWS = st.lists(st.fixed_dictionaries({"id": VALUE}) | VALUE, max_size=6)
STYLE = st.sampled_from([(None, None), (None, (",", ":")), (1, None), (0, (" , ", " : "))])
CHUNK = st.sampled_from([1, 7, 64, 1 << 18])
BYTE = st.sampled_from([None, *b'",]}{[ a\x00\xff\xc3\n'])


def read(data: bytes, array: bool, chunk: int) -> tuple[list[object], list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK", chunk)
        found = list(element_rows(io.BytesIO(data), "rows", array))
    return [row for _, row in found], [line for line, _ in found]


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, style=STYLE, chunk=CHUNK, array=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_arrays_and_values_are_read_as_others_read_them(rows, style, chunk, array, end):
    indent, separators = style
    texts = [json.dumps(row, indent=indent, separators=separators, ensure_ascii=False) for row in rows]
    text = "[\n" + ",\n".join(texts) + "\n]" if array else "\n".join(texts)
    found, lines = read(text.replace("\n", end).encode(), array, chunk)
    assert found == rows
    starts = itertools.accumulate((row.count("\n") + 1 for row in texts), initial=2 if array else 1)
    assert lines == list(starts)[:-1]


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, style=STYLE, place=st.floats(0, 1, exclude_max=True), byte=BYTE, chunk=CHUNK)
def test_no_damaged_array_is_read_in_silence(rows, style, place, byte, chunk):
    """Cut short, or with a byte changed or behind it: rows are as ``json`` says, or one is unreadable, or an error."""
    whole = json.dumps(rows, indent=style[0], separators=style[1], ensure_ascii=False).encode()
    at = int(place * (len(whole) + 1))
    damaged = whole[:at] if byte is None else whole[:at] + bytes([byte]) + whole[at + 1 :]
    try:
        wanted = json.loads(damaged.decode())
    except ValueError:
        wanted = None
    try:
        found, _ = read(damaged, True, chunk)
    except UserError as error:
        assert not isinstance(wanted, list) and str(error).startswith("rows:")
        return
    assert found == wanted if isinstance(wanted, list) else any(isinstance(row, Reject) for row in found)


ODD = {
    b'{"a": NaN}': "nan",
    b'{"a": -Infinity}': -math.inf,
    b'{"a": 1, "a": 2}': 2,
    b'{"a": %b}' % (b"9" * 40): 1e40,
    b'{"a": %b}' % (b"9" * 6000): math.inf,
    b'{"a": "\\ud800"}': "\ud800",
    b'{"a": "\\u0000"}': "\x00",
    b'{"a": 1e400}': math.inf,
    b'{"a": "\x00"}': "not_json",
    b'{"a": "\t"}': "not_json",
    b'{"a": "\xff"}': "invalid_utf8",
    b'{"a": "\xed\xa0\x80"}': "invalid_utf8",
}


@pytest.mark.parametrize("text", ODD, ids=[f"{text[:24]!r}" for text in ODD])
@pytest.mark.parametrize("chunk", [5, 1 << 18])
def test_a_row_is_read_or_refused_for_what_it_is_in_every_layout(text, chunk):
    """The rows beside it are read, whatever it is."""
    rows = [parse(text)]
    rows.append(read(b'[{"b":1},\n' + text + b' , {"b":2}]', True, chunk)[0][1])
    rows.append(read(b'{"b":1}\n' + text + b'\n{\n"b":2}', False, chunk)[0][1])
    rows.append([row for _, row in line_rows(io.BytesIO(b'{"b":1}\n' + text + b'\r\n{"b":2}'))][1])
    wanted, shown = ODD[text], [(row.reason, row.detail, row.text) for row in rows if isinstance(row, Reject)]
    if shown:
        assert shown == [shown[0]] * 4 and shown[0][0] == wanted
    else:
        assert [str(row["a"]) if wanted == "nan" else row["a"] for row in rows] == [wanted] * 4


def test_a_nest_too_deep_is_a_row_left_out_on_a_line_and_an_error_in_an_array():
    for depth, kind in ((300, list), (100_000, Reject)):
        nest = b"[" * depth + b'"]"' + b"]" * depth
        assert type(parse(nest)) is kind
        if kind is list:
            assert type(read(b"[" + nest + b"]", True, 1 << 18)[0][0]) is list
    with pytest.raises(UserError, match="rows:1: .* nested too deeply"):
        read(b"[" + nest + b"]", True, 1 << 18)


def test_what_is_too_large_is_passed_over_on_a_line_and_an_error_in_an_array(monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(json_rows, "CHUNK", 16)
    long = json.dumps({"a": "x" * 500}).encode()
    for data in (b'{"a":1}\n' + long + b'\n{"a":2}\n', b'{"a":1}\n' + long, long + b"\n" + long + b'\n{"a":2}'):
        wanted = [json.loads(line) if len(line) < 100 else "row_too_large" for line in data.split(b"\n") if line]
        assert [getattr(row, "reason", row) for _, row in line_rows(io.BytesIO(data))] == wanted
    with pytest.raises(UserError, match="rows:5: .* more than"):
        read(json.dumps([{"a": 1}, {"a": "x" * 500}], indent=1).encode(), True, 16)
