"""The fast lane takes the clean rows, all others go the careful way, and the bytes are the same by both."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_data import SHARED, sample_rows

from router_tuning.data import array, lines
from router_tuning.data.array import ArrayReader, separator_of
from router_tuning.data.blocks import Block, Place
from router_tuning.data.containers import read_blocks, recognise
from router_tuning.data.conversion import State, convert_block
from router_tuning.data.escapes import canonical
from router_tuning.data.fast_lane import lane_of
from router_tuning.data.formats import FORMATS
from router_tuning.data.lines import line_blocks
from router_tuning.data.policy import Reject
from router_tuning.errors import UserError

TURNS = [name for name, known in FORMATS.items() if known.senders]


def blocks_of(data: bytes, is_array: bool, typed: object) -> Iterator[Block]:
    stream = io.BytesIO(data)
    if is_array:
        return ArrayReader(stream, Place(), "rows", separator_of(data[:4000]), typed=typed).blocks()
    return line_blocks(stream, Place(), typed)


def converted(name: str, blocks: Iterator[Block]) -> tuple:
    """Rows, rejects, counts and last place, or the error that ends the file."""
    state, data, rejects = State(Place()), b"", b""
    try:
        for block in blocks:
            good, bad = convert_block(FORMATS[name], block, state.rows, "rows", state)
            data, rejects = data + good, rejects + bad
            state.place, state.rows = block.after, state.rows + len(block)
    except UserError as error:
        return data, rejects, str(error)
    return data, rejects, state


def careful_lines(name: str, rows: list[dict]) -> list[bytes]:
    """What :mod:`router_tuning.data.formats` makes of rows, all of them accepted."""
    known = FORMATS[name]
    made = [
        {"dataset": known.label, "id": f"{known.label}_{at}", "messages": known.convert(row)}
        for at, row in enumerate(rows)
    ]
    return [orjson.dumps(row) + b"\n" for row in made]


def forbidden(number: int) -> bytes:
    raise AssertionError(f"row {number} did not take the fast lane")


def real_files() -> list:
    folders = [Path(__file__).parents[2] / "data" / "sample" / "raw" / name for name in FORMATS]
    folders += [SHARED / "raw" / name for name in FORMATS]
    return [pytest.param(folder, id=f"{folder.parts[-3]}-{folder.name}") for folder in folders]


@pytest.mark.parametrize("folder", real_files())
def test_real_files_row_by_row(folder: Path):
    """Every block is typed, and of every row the fast lane makes the careful way's bytes, unless that refuses it."""
    if not folder.is_dir():
        pytest.skip("the shared real data are not here")
    name, lane, rows = folder.name, lane_of(folder.name), 0
    for path in sorted(folder.iterdir()):
        for block in read_blocks(recognise(path), FORMATS[name].columns, typed=lane):
            assert block.typed is not None
            for typed, row in zip(block.typed, block.rows, strict=True):
                way: list[int] = []
                made = lane.convert([typed], 0, lambda number, way=way: way.append(number) or b"")
                rows += 1
                if way:
                    with pytest.raises(Reject):
                        FORMATS[name].convert(row)
                else:
                    assert [made] == careful_lines(name, [row])
    assert rows > 20


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_clean_rows_take_the_fast_lane(name: str, ascii_only: bool, end: bytes):
    rows = [{**row, "pad": "of plain words" * 400} for row in sample_rows(name, 40)]
    if name in TURNS:
        rows = [{**row, "weight": None, "more": [{"from": [1.5, True]}]} for row in rows]
    texts = [json.dumps(row, ensure_ascii=ascii_only).encode() for row in rows]
    lane, wanted = lane_of(name), b"".join(careful_lines(name, rows))
    assert lane.convert(lane.lines(b"".join(text + end for text in texts)), 0, forbidden) == wanted
    assert lane.convert(lane.array(b"[" + (b"," + end).join(texts) + b"]"), 0, forbidden) == wanted


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("words", ["été", "🙂", "世界", "a/b", "\x1b[0m \x7f\b\f", "\\u0041 \\/ \\\\u", "<b> &'"])
@pytest.mark.parametrize("every", [1, 40])
def test_escapes_come_out_as_by_the_careful_way(name: str, words: str, every: int):
    """Few of them in long texts, and many, also of letters that need no escape."""
    plain = "word " * 400
    rows = sample_rows(name, 80)
    for number, row in enumerate(rows):
        text = f"{words} {plain}" if number % every == 0 else plain
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
        row.update({field: turns if name in TURNS else text for field in FORMATS[name].columns})
    wanted, lane = b"".join(careful_lines(name, rows)), lane_of(name)
    usual = "".join(json.dumps(row) + "\n" for row in rows)
    more = usual.replace("/", "\\/").replace("<", "\\u003C").replace("&", "\\u0026").replace("'", "\\u0027")
    for text in (usual, more):
        typed = lane.lines(text.encode())
        assert typed or every == 1
        assert not typed or lane.convert(typed, 0, forbidden) == wanted


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r'["a\\u0041\\\\u0041"]', r'["a\\u0041\\\\u0041"]'),
        (r'["\\\\/\/"]', r'["\\\\//"]'),
        (r'["\u00e9\/"]', '["é/"]'),
        (r'["\ud83d\ude42"]', '["🙂"]'),
        (r'["\u001B"]', r'["\u001b"]'),
        (r'["\u0022"]', r'["\""]'),
        (r'["\u005C"]', r'["\\"]'),
        (r'["\u000a"]', r'["\n"]'),
        (r'["\u0026"]', '["&"]'),
        (r'["\n\" a/b u"]', r'["\n\" a/b u"]'),
        (r'["\u0041"]', None),  # not told apart from an escape outside of a string
        (r"[\u0074rue]", None),
        (r"[\u0020true]", None),
        (r"[1\u002c2]", None),
        (r'["\ud83d"]', None),
        (r'["\ud83d\u0041"]', None),
        (r'["\u12g4"]', None),
        (r'["\u12', None),
        (r'["\u', None),
        ('["\\', '["\\'),
        ("[", "["),
    ],
)
def test_canonical_escapes(text: str, plain: str | None):
    assert canonical(text.encode()) == (plain and plain.encode())


def test_more_escapes_than_are_worth_it():
    assert canonical(b'["' + b"\\u00e9 " * 3 + b"x" * 1500 + b'"]') == '["é é é '.encode() + b"x" * 1500 + b'"]'
    assert canonical(b'["' + b"\\u00e9 " * 30 + b"x" * 1500 + b'"]') is None


HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
DOUBTFUL = [
    {"conversations": []},
    {"conversations": [HUMAN]},
    {"conversations": [HUMAN, {"from": "gpt", "value": ""}]},
    {"conversations": [HUMAN, {"from": "gpt", "value": " \u2003\n"}]},
    {"conversations": [{"from": "system", "value": " "}, HUMAN, GPT]},
    {"conversations": [{"from": "bing", "value": "b"}, GPT]},
    {"conversations": [{"from": "robot", "value": "b"}, GPT]},
    {"conversations": [HUMAN, {"from": "gpt", "value": 5}]},
    {"conversations": [HUMAN, {"from": "gpt", "value": 1.5}]},
    {"conversations": [HUMAN, {"from": "gpt", "value": None}]},
    {"conversations": [HUMAN, {"from": "gpt", "value": ["a"]}]},
    {"conversations": [HUMAN, {"from": "gpt", "value": {"a": "b"}}]},
]
ODD = [
    {"conversations": [HUMAN, {"from": "gpt"}]},
    {"conversations": [HUMAN, {"from": None, "value": "a"}]},
    {"conversations": [HUMAN, "a"]},
    {"conversations": {"from": "gpt", "value": "a"}},
    {"conversations": None},
    {},
    [],
    "text",
    None,
]


@pytest.mark.parametrize("row", DOUBTFUL)
def test_rows_in_doubt_go_the_careful_way(row: dict):
    """One by one, and in their place: what is made of them stands between the clean rows."""
    clean = {"conversations": [HUMAN, GPT]}
    typed = lane_of("vicuna_sharegpt").array(json.dumps([clean, row, clean]).encode())
    first, _, last = careful_lines("vicuna_sharegpt", [clean] * 3)
    asked = []
    made = lane_of("vicuna_sharegpt").convert(typed, 0, lambda number: asked.append(number) or b'{"mended": 1}\n')
    assert asked == [1] and made == first + b'{"mended": 1}\n' + last
    assert lane_of("vicuna_sharegpt").convert(typed, 0, lambda number: b"") == first + last


@pytest.mark.parametrize("row", ODD)
def test_blocks_with_an_odd_row_go_the_careful_way(row: object):
    text = json.dumps(row).encode()
    clean = json.dumps({"conversations": [HUMAN, GPT]}).encode()
    assert lane_of("slim_orca").array(b"[" + clean + b"]") and lane_of("slim_orca").lines(clean + b"\n")
    assert lane_of("slim_orca").array(b"[" + clean + b"," + text + b"]") is None
    assert lane_of("slim_orca").lines(clean + b"\n" + text + b"\n") is None


@pytest.mark.parametrize("name", ["meta_math_qa", "evol_code_alpaca", "alpaca"])
@pytest.mark.parametrize("value", [" ", "", "\n\u3000", None, 7, ["text"], {"text": "t"}])
def test_pairs_with_a_blank_or_without_text(name: str, value: object):
    row = sample_rows(name, 1)[0]
    for field in FORMATS[name].columns[:: len(FORMATS[name].columns) - 1]:
        typed = lane_of(name).array(json.dumps([{**row, "input": "", field: value}]).encode())
        assert lane_of(name).convert(typed, 0, lambda number: b"careful\n") == b"careful\n"


@pytest.mark.parametrize(
    "text",
    [
        b'{"query":"a","response":"b"} {"query":"a","response":"b"}\n{"query":"a",\n"response":"b"}\n',
        b'{"query":"a","response":"b"}{"query":"a","response":"b"}\n{"query":\n"a","response":"b"}\n',
        b'{"query":"a","response":"b"\n}{"query":"a","response":"b"}\n',
        b'{"query":"a","response":"b"}\n\n{"query":"a","response":"b"}\n',
        b'{"query":"a","response":"b"}\n{"query":"a","response":"b"}',
        b'{"query":"a","response":"b"},\n',
        b'{"query":"a","response":"b","x":"\xff"}\n',
        b'{"query":"a","response":"b","x":"\xed\xa0\x80"}\n',
        b'{"query":"a","response":"b","x":NaN}\n',
        b'{"query":"a","response":"\\ud83d"}\n',
        b'{"query":"a","response":"b","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        b"\n",
    ],
)
def test_lines_that_are_not_one_clean_row_each(text: bytes):
    assert lane_of("meta_math_qa").lines(text) is None


TEXT = st.text(alphabet='ab \n\t"\\/}{],:é\x00\x1f\x7f\u2028\u2003🙂', max_size=6)
RAW = st.sampled_from(
    ['"\\u0061"', '"\\/"', '" \\u00e9\\ud83d\\ude00"', '"\\ud83d"', '"\\u000a"', '"\\\\u0061"', '"\\x"', '"},{"']
)
OTHER = st.sampled_from(["null", "17", "1.5e400", "9" * 5000, "01", "NaN", "[]", '{"value":"x"}', "tru", "\ufeff1"])
VALUE = TEXT.map(json.dumps) | TEXT.map(lambda text: json.dumps(text, ensure_ascii=False)) | RAW
SENDER = st.sampled_from(["human", "gpt", "system", "bard", "bing", "Gpt"]).map(json.dumps)


def pairs(fields: dict) -> st.SearchStrategy[str]:
    """JSON of an object with these fields in any order, some of them twice or absent, and with others."""
    known = st.one_of([st.tuples(st.just(f'"{key}"'), value) for key, value in fields.items()])
    extra = st.tuples(st.sampled_from(['"id"', '"\\u0076alue"', '"é"', '"role"', '"question"']), VALUE | OTHER)
    whole = st.tuples(*[st.tuples(st.just(f'"{key}"'), value) for key, value in fields.items()]).map(list)
    kept = st.tuples(whole, st.lists(st.one_of(known, extra), max_size=1)).map(lambda parts: parts[0] + parts[1])
    space = st.sampled_from(["", "", " ", "\t"])
    return st.tuples(kept | st.lists(known, max_size=3), space).map(
        lambda made: "{" + ",".join(f"{key}{made[1]}:{made[1]}{value}" for key, value in made[0]) + "}"
    )


def rows_of(name: str) -> st.SearchStrategy[str]:
    if name in TURNS:
        turn = pairs({"from": SENDER, "value": VALUE | VALUE | VALUE | OTHER})
        turns = st.lists(turn, max_size=3).map(lambda turns: "[" + ",".join(turns) + "]")
        return pairs({"conversations": turns})
    return pairs({column: VALUE | VALUE | VALUE | OTHER for column in FORMATS[name].columns})


FILE = st.sampled_from(list(FORMATS)).flatmap(
    lambda name: st.tuples(st.just(name), st.lists(rows_of(name) | rows_of(name) | OTHER, min_size=1, max_size=5))
)


@settings(max_examples=500, deadline=None)
@given(
    file=FILE,
    is_array=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n", " \n ", ""]),
    damage=st.none() | st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(list(b'"\\{},\xff\xc3\x01 '))),
    size=st.sampled_from([40, 200, 1 << 17]),
)
def test_both_ways_make_the_same_of_any_file(file, is_array: bool, end: str, damage, size: int):
    """Rows, rejects with their lines, counts, places: whichever rows take the lane, cut into blocks of any size."""
    name, rows = file
    text = "[" + f",{end}".join(rows) + "]" if is_array else end.join(rows) + end
    data = bytearray(text.encode())
    if damage:
        data[int(damage[0] * len(data))] = damage[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", size)
        patch.setattr(array, "BLOCK_BYTES", size)
        fast = converted(name, blocks_of(bytes(data), is_array, lane_of(name)))
        careful = converted(name, blocks_of(bytes(data), is_array, None))
    if isinstance(careful[2], str):
        assert isinstance(fast[2], str)  # how far it comes before depends on where blocks end
    else:
        assert fast == careful


def test_what_looks_like_the_end_of_a_row_inside_of_a_text():
    """An array is cut nowhere but between its rows, whatever stands in their texts."""
    trap = '"},\n {"conversations": [{"from": "gpt", "value": "'
    rows = [{"conversations": [{"from": "human", "value": trap * 9}, {"from": "gpt", "value": f"{trap}]"}]}] * 50
    wanted = b"".join(careful_lines("slim_orca", rows))
    for indent in (None, 0, 1):
        data = json.dumps(rows, indent=indent).encode()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(array, "BLOCK_BYTES", 3000)
            blocks = list(blocks_of(data, True, lane_of("slim_orca")))
        assert len(blocks) > 5 and all(block.typed for block in blocks[:-1])
        assert converted("slim_orca", iter(blocks))[0] == wanted
