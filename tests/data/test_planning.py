"""Files cut into stretches: together they are the file, with the rows and lines that were counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_data import sample_rows, write_rows

from utils.data import planning
from utils.data.blocks import Place
from utils.data.containers import ARRAY, LINES, read_blocks, recognise
from utils.data.planning import Unit, cut_file, plan_of, resumed_units, whole_files
from utils.errors import UserError

COLUMNS = ("id", "query", "response")


def rows_and_lines(unit: Unit) -> list[tuple[object, int]]:
    blocks = read_blocks(unit.container, COLUMNS, unit.start, unit.stop)
    return [(row, block.line_of(number)) for block in blocks for number, row in enumerate(block.rows)]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz", ".jsonl.zst", ".parquet", ".arrow"])
@pytest.mark.parametrize("indent", [None, 2])
def test_counted_units_are_the_file(ending: str, indent: int | None, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "UNIT_BYTES", 900)
    monkeypatch.setattr(planning, "UNIT_ROWS", 10)
    monkeypatch.setattr(planning, "READ_BYTES", 37)
    container = recognise(write_rows(tmp_path / "rows", sample_rows("meta_math_qa", 60), ending, indent))
    (whole,) = whole_files([container])
    units = cut_file(container)
    assert (len(units) > 3) == (ending in (".json", ".jsonl", ".parquet"))
    parts = [rows_and_lines(unit) for unit in units]
    assert [len(part) for part in parts] == [unit.rows for unit in units]
    assert [pair for part in parts for pair in part] == rows_and_lines(whole)


@pytest.mark.parametrize("content", [b'{"id":1}\n\n{"id":2}\n', b'\n{"id":1}\n', b' {"id":1}\n', b'{"id":1}\n \t\n'])
def test_blank_lines_are_not_counted_as_rows(content: bytes, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    (unit,) = cut_file(recognise(path))
    assert unit.rows is None


def test_a_file_that_ends_at_a_cut_has_no_empty_unit(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "UNIT_BYTES", 8)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id":1}\n' * 4)
    units = cut_file(recognise(path))
    assert [unit.rows for unit in units] == [1] * len(units) and units[-1].stop is None
    assert [row for unit in units for row, _ in rows_and_lines(unit)] == [{"id": 1}] * 4


VALUE = st.recursive(
    st.integers(0, 9) | st.text(alphabet='}{,:"i d\n', max_size=6),
    lambda inner: st.lists(st.fixed_dictionaries({"id": inner}), max_size=3) | st.lists(inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=1200, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"id": VALUE}) | VALUE, max_size=8),
    style=st.sampled_from([".jsonl", (None, (",", ":")), (None, None), (1, None)]),
    unit_bytes=st.integers(1, 40),
    read_bytes=st.integers(1, 30),
    blank=st.integers(0, 9),
)
def test_units_that_can_be_read_are_the_file(rows, style, unit_bytes, read_bytes, blank, tmp_path_factory):
    """Rows that look like separators mislead the cuts of an array; then some unit cannot be read, which is noticed."""
    path = tmp_path_factory.getbasetemp() / "units.rows"
    if style == ".jsonl":
        text = "".join(json.dumps(row) + "\n" + "\n" * (number == blank) for number, row in enumerate(rows))
    else:
        text = json.dumps(rows, indent=style[0], separators=style[1])
    path.write_text(text or "\n[]")
    container = recognise(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "UNIT_BYTES", unit_bytes)
        patch.setattr(planning, "READ_BYTES", read_bytes)
        units = cut_file(container)
    (whole,) = whole_files([container])
    try:
        parts = [rows_and_lines(unit) for unit in units]
    except UserError:
        assert container.kind == ARRAY and len(units) > 1
        return
    assert [pair for part in parts for pair in part] == rows_and_lines(whole)
    if container.kind == LINES:
        assert all(unit.rows in (None, len(part)) for unit, part in zip(units, parts, strict=True))


def test_a_plan_holds_for_the_same_files_only(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "UNIT_BYTES", 500)
    paths = [write_rows(tmp_path / name, sample_rows("meta_math_qa", 30), ".jsonl") for name in "ba"]
    containers = [recognise(path) for path in paths]
    units = [unit for container in containers for unit in cut_file(container)]
    plan = json.loads(json.dumps(plan_of(units)))
    assert resumed_units(plan, containers) == units and len(units) > 4
    assert resumed_units({**plan, "version": 0}, containers) is None
    assert resumed_units(plan, containers[:1]) is None
    with paths[0].open("a") as file:
        file.write("{}\n")
    assert resumed_units(plan, containers) is None


def test_tables_are_cut_at_row_groups(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "UNIT_ROWS", 15)
    container = recognise(write_rows(tmp_path / "rows", [{"id": n} for n in range(40)], ".parquet"))
    assert [(unit.start, unit.stop, unit.rows) for unit in cut_file(container)] == [
        (Place(0, 0), 14, 14),
        (Place(14, 14), 28, 14),
        (Place(28, 28), None, 12),
    ]
