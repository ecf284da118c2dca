"""Files cut into stretches: together they are the file, with the rows and lines that are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_data import sample_rows, write_rows

from router_tuning.data import counting, planning
from router_tuning.data.blocks import BOM, Place
from router_tuning.data.containers import ARRAY, LINES, read_blocks, recognise
from router_tuning.data.counting import count
from router_tuning.data.planning import Plan, Stretch, cut_file
from router_tuning.errors import UserError

COLUMNS = ("id", "query", "response")


def rows_and_lines(stretches: list[Stretch]) -> list[list[tuple[object, int]]]:
    """Of each stretch, with the lines before it as they are counted."""
    parts, line = [], 0
    for stretch in stretches:
        container = stretch.container
        start = Place(stretch.start, stretch.start if container.is_table else line)
        blocks = read_blocks(container, COLUMNS, start, stretch.stop)
        parts.append([(row, block.line_of(number)) for block in blocks for number, row in enumerate(block.rows)])
        line += count(stretch)[1] if stretch.can_be_counted else 0
    return parts


def rows_of(stretch: Stretch) -> int | None:
    """As many as are known before it is converted."""
    return count(stretch)[0] if stretch.can_be_counted else stretch.rows


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz", ".jsonl.zst", ".parquet", ".arrow"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_counted_stretches_are_the_file(ending: str, indent: int | None, mark: bytes, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "STRETCH_BYTES", 900)
    monkeypatch.setattr(planning, "STRETCH_ROWS", 10)
    monkeypatch.setattr(planning, "SEARCH_BYTES", 5)
    monkeypatch.setattr(counting, "READ_BYTES", 37)
    path = write_rows(tmp_path / "rows", sample_rows("meta_math_qa", 60), ending, indent)
    if ending in (".json", ".jsonl"):
        path.write_bytes(mark + path.read_bytes())
    container = recognise(path)
    stretches = cut_file(container)
    assert (len(stretches) > 3) == (ending in (".json", ".jsonl", ".parquet"))
    parts = rows_and_lines(stretches)
    assert [len(part) for part in parts] == [rows_of(stretch) for stretch in stretches]
    assert [pair for part in parts for pair in part] == rows_and_lines([Stretch(container)])[0]


@settings(max_examples=500, deadline=None)
@given(
    lines=st.lists(st.sampled_from([b"", b" ", b"\r", b"\t \r", b"{}", b" 1", b"x" * 9, b'{"a": "b"}\r']), max_size=8),
    ended=st.booleans(),
    marked=st.booleans(),
    read=st.integers(1, 12),
)
def test_lines_are_counted_without_the_blank_ones(lines, ended, marked, read: int, tmp_path_factory):
    """Wherever chunks end. A mark at the start of the file is no text."""
    content = BOM * marked + b"\n".join(lines) + b"\n" * ended
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(b'{"first": 1}\n' + content)
    container = recognise(path)
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "READ_BYTES", read)
        assert count(Stretch(container)) == (sum(bool(line.strip()) for line in lines), content.count(b"\n"))


def test_a_file_that_ends_at_a_cut_has_no_empty_stretch(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "STRETCH_BYTES", 8)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id":1}\n' * 4)
    stretches = cut_file(recognise(path))
    assert [rows_of(stretch) for stretch in stretches] == [1] * 4 and stretches[-1].stop is None
    assert [row for part in rows_and_lines(stretches) for row, _ in part] == [{"id": 1}] * 4


VALUE = st.recursive(
    st.integers(0, 9) | st.text(alphabet='}{,:"i d\n', max_size=6),
    lambda inner: st.lists(st.fixed_dictionaries({"id": inner}), max_size=3) | st.lists(inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=1200, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"id": VALUE}) | VALUE, max_size=8),
    style=st.sampled_from([".jsonl", (None, (",", ":")), (None, None), (1, None)]),
    stretch_bytes=st.integers(1, 40),
    read_bytes=st.integers(1, 30),
    blank=st.integers(0, 9),
)
def test_stretches_that_can_be_read_are_the_file(rows, style, stretch_bytes, read_bytes, blank, tmp_path_factory):
    """Rows that look like separators mislead the cuts of an array; then a stretch cannot be read, which is noticed."""
    path = tmp_path_factory.getbasetemp() / "stretches.rows"
    if style == ".jsonl":
        text = "".join(json.dumps(row) + "\n" + "\n" * (number == blank) for number, row in enumerate(rows))
    else:
        text = json.dumps(rows, indent=style[0], separators=style[1])
    path.write_text(text or "\n[]")
    container = recognise(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "STRETCH_BYTES", stretch_bytes)
        patch.setattr(planning, "SEARCH_BYTES", read_bytes)
        patch.setattr(counting, "READ_BYTES", read_bytes)
        stretches = cut_file(container)
        try:
            parts = rows_and_lines(stretches)
        except UserError:
            assert container.kind == ARRAY and len(stretches) > 1
            return
        counts = [rows_of(stretch) for stretch in stretches]
    assert [pair for part in parts for pair in part] == rows_and_lines([Stretch(container)])[0]
    if container.kind == LINES:
        assert counts == [len(part) for part in parts]


def test_a_plan_holds_for_the_same_files_only(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "STRETCH_BYTES", 500)
    paths = [write_rows(tmp_path / name, sample_rows("meta_math_qa", 30), ".jsonl") for name in "ba"]
    containers = [recognise(path) for path in paths]
    plan = Plan([stretch for container in containers for stretch in cut_file(container)], counting=False)
    saved = json.loads(json.dumps(plan.as_json()))
    assert Plan.of(saved, containers) == plan and len(plan.stretches) > 4
    assert Plan.of({**saved, "version": 0}, containers) is None
    assert Plan.of(saved, containers[:1]) is None
    with paths[0].open("a") as file:
        file.write("{}\n")
    assert Plan.of(saved, containers) is None


def test_tables_are_cut_at_row_groups(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "STRETCH_ROWS", 10)
    container = recognise(write_rows(tmp_path / "rows", [{"id": n} for n in range(40)], ".parquet"))
    assert [(stretch.start, stretch.stop, stretch.rows) for stretch in cut_file(container)] == [
        (0, 14, 14),
        (14, 28, 14),
        (28, None, 12),
    ]
