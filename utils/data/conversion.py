"""One stretch of rows to messages, numbered and put to its place beside those that others convert.

The stretches of a data set go into the same two files. A stretch is numbered once the rows before it are counted, and
written once the size of what is made of them is known; the board says both. Rows do not depend on where blocks or
stretches begin, so neither kills nor the number of workers show in the result.

A stretch that takes long leaves a checkpoint, which is replaced as a whole after the rows that it speaks of are
written. It counts only if all before the stretch was complete, see :mod:`router_tuning.data.progress`.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson

from router_tuning.data.blocks import Block, Place, Unreadable
from router_tuning.data.board import DATA, LINES, READ, REJECTS, ROWS, UNKNOWN, Board
from router_tuning.data.containers import read_blocks
from router_tuning.data.counting import count
from router_tuning.data.fast_lane import lane_of
from router_tuning.data.formats import FORMATS, Format
from router_tuning.data.pieces import Piece
from router_tuning.data.planning import Stretch
from router_tuning.data.policy import Reject, json_type
from router_tuning.data.writing import replace_file, writing

CHECKPOINT_BYTES = 32 << 20
CHECKPOINT = "checkpoint.json"
"""Name of the file that says how far the stretch behind the last complete one is."""

LINE = orjson.OPT_APPEND_NEWLINE


@dataclass
class State:
    """Progress of a stretch: what was read, what of it is written (sizes in bytes), and counts by reason."""

    place: Place
    rows: int = 0
    data_size: int = 0
    rejects_size: int = 0
    accepted: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, saved: dict) -> State:
        """From ``asdict``; raises TypeError or KeyError if it is not."""
        return cls(**{**saved, "place": Place(**saved["place"])})


@dataclass(frozen=True)
class Task:
    """Stretch number ``number`` of a data set to convert.

    ``run`` and ``entry``: the data set and what lies before the stretch, on the board. ``counting``: whether to count
    the rows first. ``shown``: the file's name as rejects give it. ``begun``: how far an earlier run came.
    """

    name: str
    stretch: Stretch
    number: int
    folder: Path
    shown: str
    run: int
    entry: int
    counting: bool = False
    begun: State | None = None


class Miscounted(Exception):
    """A stretch has other rows than were counted, so that what lies behind it has wrong numbers."""


def convert(task: Task, board: Board) -> State:
    """Convert a stretch, from where an earlier run left it.

    Raises :class:`UserError` if the source cannot be read to its end or the results cannot be written,
    :class:`Miscounted`, and :class:`Stopped` when told to.
    """
    stretch, known = task.stretch, FORMATS[task.name]
    rows, lines = count(stretch) if task.counting else (stretch.rows, 0)
    first_row = board.wait(task.run, task.entry, ROWS)
    line = board.wait(task.run, task.entry, LINES) if stretch.start else 0
    if rows is not None:
        board.put(task.entry + 1, LINES, line + lines)
        board.put(task.entry + 1, ROWS, first_row + rows)
    is_table = stretch.container.is_table
    state = task.begun or State(Place(stretch.start, stretch.start if is_table else line))
    saved = state.data_size
    lane = None if is_table else lane_of(task.name)
    with ExitStack() as stack:
        data = stack.enter_context(Piece(task.folder / "data.jsonl", state.data_size))
        rejects = stack.enter_context(Piece(task.folder / "rejects.jsonl", state.rejects_size))
        for block in read_blocks(stretch.container, known.columns, state.place, stretch.stop, lane):
            board.check(task.run)
            good, bad = convert_block(known, block, first_row + state.rows, task.shown, state)
            begins = board.get(task.entry, DATA), board.get(task.entry, REJECTS)
            data.write(good, begins[0])
            rejects.write(bad, begins[1])
            state.place = block.after
            state.rows += len(block)
            state.data_size, state.rejects_size = data.size, rejects.size
            board.put(task.entry + 1, READ, state.rows)
            if UNKNOWN not in begins and state.data_size - saved >= CHECKPOINT_BYTES:
                data.place(begins[0])
                rejects.place(begins[1])
                _save(task, state)
                saved = state.data_size
        if rows is None:
            board.put(task.entry + 1, LINES, state.place.line)
            board.put(task.entry + 1, ROWS, first_row + state.rows)
        elif rows != state.rows:
            raise Miscounted
        for piece, field_ in ((data, DATA), (rejects, REJECTS)):
            begin = board.wait(task.run, task.entry, field_)
            piece.place(begin)
            # Not before: two that write into one file at once wait for each other, and not idly.
            board.put(task.entry + 1, field_, begin + piece.size)
    return state


def convert_block(known: Format, block: Block, first: int, shown: str, state: State) -> tuple[bytes, bytes]:
    """Lines of the accepted rows and of the rejects of a block whose first row has the number ``first``."""
    bad: dict[int, Reject] = {}
    label, turn, dumps = known.label, known.convert, orjson.dumps

    def line(number: int) -> bytes:
        """Of an accepted row; empty for another one, which is noted down."""
        row = block.rows[number - first]
        try:
            if row.__class__ is not dict:
                raise _no_object(row)
            return dumps({"dataset": label, "id": f"{label}_{number}", "messages": turn(row)}, option=LINE)
        except Reject as reject:
            bad[number] = reject
        except orjson.JSONEncodeError:
            bad[number] = Reject("lone_surrogate", "half of a surrogate pair: no text")
        return b""

    if block.typed is None:
        good = b"".join(map(line, range(first, first + len(block))))
    else:
        good = lane_of(known.name).convert(block.typed, first, line)
    state.accepted += len(block) - len(bad)
    if not bad:
        return good, b""
    counts = Counter(reject.reason for reject in bad.values())
    state.reasons = dict(sorted((counts + Counter(state.reasons)).items()))
    entries = []
    for number, reject in bad.items():
        place = {"dataset": label, "id": f"{label}_{number}", "file": shown, "line": block.line_of(number - first)}
        row = _shown_row(block.rows[number - first])
        entries.append(dumps({**place, "reason": reject.reason, "detail": reject.detail, **row}, option=LINE))
    return good, b"".join(entries)


def _no_object(row: object) -> Reject:
    if isinstance(row, Unreadable):
        return Reject(row.reason, row.detail)
    return Reject("not_an_object", f"the row is {json_type(row)}, not an object")


def _shown_row(row: object) -> dict:
    """The row itself, or as much of it as can be written down."""
    if isinstance(row, Unreadable):
        return {"text": row.text}
    try:
        orjson.dumps(row)
        return {"row": row}
    except orjson.JSONEncodeError:
        return {"text": _as_text(row)}


def _as_text(row: object) -> str:
    try:
        return json.dumps(row, default=str)[:1000]
    except (RecursionError, ValueError):
        return ""


def _save(task: Task, state: State) -> None:
    with writing(task.folder):
        replace_file(task.folder / CHECKPOINT, orjson.dumps({"number": task.number, "state": asdict(state)}))
