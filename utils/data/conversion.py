"""One unit of rows to messages, in files that a killed run leaves fit to be continued.

A unit writes three files: rows, rejects, and a state that says how much of the two is good, and from where in the
source to go on. The state is replaced as a whole after the rows that it speaks of are written; whatever a killed run
wrote behind it is cut off. Rows do not depend on where blocks or units begin, so neither kills nor the number of
workers show in the result.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import orjson

from utils.data.blocks import Block, Place, Unreadable
from utils.data.containers import read_blocks
from utils.data.fast_lane import lane_of
from utils.data.formats import FORMATS, Format
from utils.data.planning import Unit
from utils.data.policy import Reject, json_type
from utils.data.writing import replace_file, writing

CHECKPOINT_BYTES = 32 << 20
LINE = orjson.OPT_APPEND_NEWLINE


@dataclass
class State:
    """Progress of a unit: what was read, what of it is written (sizes in bytes), and counts by reason."""

    place: Place
    rows: int = 0
    data_size: int = 0
    rejects_size: int = 0
    accepted: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    done: bool = False


@dataclass(frozen=True)
class Task:
    """A unit to convert: number ``number`` of its data set, whose rows before it are ``first_row``."""

    name: str
    unit: Unit
    number: int
    first_row: int
    folder: Path
    shown: str
    """The file's name as rejects give it."""

    def path(self, kind: str) -> Path:
        """Its file of ``data``, ``rejects`` or ``state``."""
        return self.folder / f"{self.number:05d}.{kind}"


class Stopped(Exception):
    """The run is over for another reason."""


def load_state(task: Task) -> State | None:
    """How far an earlier run came, if its files are all there."""
    try:
        saved = orjson.loads(task.path("state").read_bytes())
        state = State(Place(**saved.pop("place")), **saved)
        sizes = [os.path.getsize(task.path(kind)) for kind in ("data", "rejects")]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return state if sizes[0] >= state.data_size and sizes[1] >= state.rejects_size else None


def convert(task: Task, progress: Callable[[int], None]) -> State:
    """Convert a unit, from where an earlier run left it; ``progress`` is told of rows read and may raise Stopped.

    Raises :class:`UserError` if the source cannot be read to its end or the results cannot be written.
    """
    state = load_state(task) or State(task.unit.start)
    progress(state.rows)
    known = FORMATS[task.name]
    with ExitStack() as stack:
        stack.enter_context(writing(task.folder))
        data, rejects = (stack.enter_context(_reopened(task, kind, state)) for kind in ("data", "rejects"))
        if state.done:
            return state
        saved = state.data_size
        lane = None if task.unit.container.is_table else lane_of(task.name)
        for block in read_blocks(task.unit.container, known.columns, state.place, task.unit.stop, lane):
            good, bad = convert_block(known, block, task.first_row + state.rows, task.shown, state)
            data.write(good)
            rejects.write(bad)
            state.place = block.after
            state.rows += len(block)
            state.data_size += len(good)
            state.rejects_size += len(bad)
            if state.data_size - saved >= CHECKPOINT_BYTES:
                _save(task, state, data, rejects)
                saved = state.data_size
            progress(len(block))
        state.done = True
        _save(task, state, data, rejects)
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


def _reopened(task: Task, kind: str, state: State) -> BinaryIO:
    """A file of the unit, cut to what the state vouches for."""
    file = task.path(kind).open("ab")
    file.truncate(state.data_size if kind == "data" else state.rejects_size)
    return file


def _save(task: Task, state: State, *files: BinaryIO) -> None:
    for file in files:
        file.flush()
    replace_file(task.path("state"), orjson.dumps(asdict(state)))
