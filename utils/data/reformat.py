"""Raw data sets to ``{"dataset", "id", "messages"}`` rows, each set by itself: published as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe, Process, connection, parent_process
from pathlib import Path
from typing import BinaryIO

import orjson
import xxhash
from tqdm import tqdm

from router_tuning.data.acceptance import FILTERED, MAX_ROW_BYTES, Reject, json_type
from router_tuning.data.containers import BUFFER, reading, recognise
from router_tuning.data.formats import FORMATS, Format
from router_tuning.data.json_rows import EXCERPT
from router_tuning.data.sources import Source, source_of
from router_tuning.errors import UserError
from router_tuning.files import scratch_folder, writing

VERSION = 3
"""Of the rules by which rows are read and accepted; what another version made is not resumed."""

LINE = orjson.OPT_APPEND_NEWLINE


@dataclass(frozen=True)
class Settings:
    """How to run: data sets at a time, whether to keep finished ones, how many faulty rows (a share) to bear."""

    workers: int = 1
    resume: bool = False
    max_reject_rate: float = 0.01
    strict: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"--workers must be at least 1, not {self.workers}")
        if not 0 <= self.max_reject_rate <= 1:
            raise UserError(f"--max_reject_rate must be a share between 0 and 1, not {self.max_reject_rate}")


@dataclass
class Outcome:
    """What became of a data set: rows read, accepted, left out by reason; ``error``: why it was not published.

    ``resumed``: it was complete before; ``too_many``: the error is that too many rows are left out.
    """

    name: str
    rows: int = 0
    accepted: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    resumed: bool = False
    error: str | None = None
    too_many: bool = False

    @property
    def filtered(self) -> int:
        """Sound rows that the policy leaves out."""
        return sum(count for reason, count in self.reasons.items() if reason in FILTERED)

    @property
    def refused(self) -> int:
        """Faulty rows."""
        return sum(self.reasons.values()) - self.filtered


def reformat(places: Mapping[str, str | Path], save_path: Path, settings: Settings) -> list[Outcome]:
    """Convert data sets into folders of ``save_path``; what hinders one of them is in its outcome, the others go on.

    Each is read in a process of its own, and its folder gets ``data.jsonl``, ``rejects.jsonl`` and ``reformat.json``,
    the same bytes for any number of workers.

    Args:
        places: file, folder or hub id of each data set, by name.
    """
    outcomes = dict.fromkeys(places)
    waiting, running = list(places), {}
    while waiting or running:
        while waiting and len(running) < settings.workers:
            name = waiting.pop(0)
            receiver, sender = Pipe(duplex=False)
            run = (sender, name, places[name], save_path / name, settings)
            running[receiver] = Process(target=_send_outcome, args=run, name=name, daemon=True)
            running[receiver].start()
            sender.close()
        for receiver in connection.wait(list(running)):
            process = running.pop(receiver)
            outcomes[process.name] = _outcome_of(process, receiver)
    return list(outcomes.values())


def _outcome_of(process: Process, receiver: connection.Connection) -> Outcome:
    """What a process sends, or that it ended without a word, as libraries in C do over some damaged files."""
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        died = f"the process that read it died with exit code {process.exitcode}: out of memory, or a damaged file?"
        return Outcome(process.name, error=f"{process.name}: {died}")


def _send_outcome(sender: connection.Connection, *run: object) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):  # the parent says so
        sender.send(reformat_one(*run))


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def reformat_one(name: str, place: str | Path, folder: Path, settings: Settings) -> Outcome:
    """Convert one data set into ``folder``."""
    try:
        source = source_of(name, place)
        outcome = _finished(source, folder) if settings.resume else None
        return _convert(source, folder, settings) if outcome is None else _judged(outcome, folder, settings)
    except UserError as error:
        return Outcome(name, error=str(error))
    # Whatever a library makes of a file that nobody has thought of, it is no reason to lose the other data sets.
    except Exception as error:
        return Outcome(name, error=f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _convert(source: Source, folder: Path, settings: Settings) -> Outcome:
    with scratch_folder(folder) as scratch, writing(folder):
        with (scratch / "data.jsonl").open("wb", BUFFER) as data, (scratch / "rejects.jsonl").open("wb") as rejects:
            outcome = _write_rows(source, data, rejects)
        _judged(outcome, folder, settings)
        os.replace(scratch / "rejects.jsonl", folder / "rejects.jsonl")
        if outcome.error is None:
            report = _report(outcome, source, os.path.getsize(scratch / "data.jsonl"))
            (scratch / "reformat.json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2 | LINE))
            # The report goes first and comes last: whenever a kill comes, it speaks of the files beside it.
            (folder / "reformat.json").unlink(missing_ok=True)
            for name in ("data.jsonl", "reformat.json"):
                os.replace(scratch / name, folder / name)
    return outcome


def _write_rows(source: Source, data: BinaryIO, rejects: BinaryIO) -> Outcome:
    """Convert all rows, in their order. A row keeps its number in the source, whatever is left out before it."""
    known = FORMATS[source.name]
    rows, reasons = 0, Counter()
    for file, line, row in tqdm(_rows(source, known), desc=source.name, unit=" rows", disable=None):
        row_id = f"{known.label}_{rows}"
        try:
            data.write(converted(known, row, row_id))
        except Reject as reject:
            reasons[reject.reason] += 1
            where = {"dataset": known.label, "id": row_id, "file": file, "line": line}
            why = {"reason": reject.reason, "detail": reject.detail}
            rejects.write(orjson.dumps({**where, **why, **_shown(row)}, option=LINE))
        rows += 1
    return Outcome(source.name, rows, rows - reasons.total(), dict(sorted(reasons.items())))


def _rows(source: Source, known: Format) -> Iterator[tuple[str, int, object]]:
    """File, line and value of each row; what the files are is found out before the first one is read."""
    for container in [recognise(path) for path in source.files]:
        file = source.shown(container.path)
        for line, row in container.rows(known.columns):
            yield file, line, row


def converted(known: Format, row: object, row_id: str) -> bytes:
    """The line that is published of a row; raises :class:`Reject` for one that is left out."""
    if row.__class__ is not dict:
        raise row if isinstance(row, Reject) else Reject("not_an_object", f"the row is {json_type(row)}, no object")
    try:
        line = orjson.dumps({"dataset": known.label, "id": row_id, **known.convert(row)}, option=LINE)
    except orjson.JSONEncodeError:
        raise Reject("lone_surrogate", "half of a surrogate pair: no text") from None
    if len(line) > MAX_ROW_BYTES:
        raise Reject("row_too_large", f"{len(line):,} bytes, more than {MAX_ROW_BYTES >> 20} MiB")
    return line


def _shown(row: object) -> dict:
    """The row itself as JSON, or as much of its text as says what JSON can't: NaN, halves of surrogate pairs, …"""
    if isinstance(row, Reject):
        return {"text": row.text}
    with suppress(TypeError, ValueError, RecursionError):
        json.dumps(row, allow_nan=False), orjson.dumps(row)
        return {"row": row}
    with suppress(ValueError, RecursionError):
        return {"text": json.dumps(row, default=str)[:EXCERPT]}
    return {"text": ""}


def _judged(outcome: Outcome, folder: Path, settings: Settings) -> Outcome:
    """With the error that it is to have no rows or too many that are left out, if it is one for these settings."""
    name, rows, where = outcome.name, outcome.rows, folder / "rejects.jsonl"
    if settings.strict and outcome.reasons:
        left_out = sum(outcome.reasons.values())
        outcome.error = f"{name}: --strict, but {left_out} of {rows} rows are left out; see {where}"
    elif outcome.refused > settings.max_reject_rate * rows:
        outcome.error = (
            f"{name}: {outcome.refused} of {rows} rows are refused, more than --max_reject_rate "
            f"{settings.max_reject_rate:g}; see {where}, then mend the data or run again with a higher rate"
        )
    outcome.too_many = outcome.error is not None
    if not outcome.accepted and not outcome.too_many:
        outcome.error = f"{name}: none of {rows} rows is accepted; see {where}" if rows else f"{name}: it has no row"
    return outcome


def _report(outcome: Outcome, source: Source, size: int) -> dict:
    """What ``reformat.json`` says; ``size``: bytes of ``data.jsonl``."""
    return {
        "version": VERSION,
        "dataset": outcome.name,
        "rows": outcome.rows,
        "accepted": outcome.accepted,
        "left_out": outcome.reasons,
        "bytes": size,
        "sources": [
            {"file": source.shown(path), "bytes": path.stat().st_size, "xxh3_128": hash_of(path)}
            for path in source.files
        ],
    }


def _finished(source: Source, folder: Path) -> Outcome | None:
    """What an earlier run made of these very files, if it is there."""
    try:
        report = orjson.loads((folder / "reformat.json").read_bytes())
        outcome = Outcome(source.name, report["rows"], report["accepted"], report["left_out"], resumed=True)
        size = (folder / "data.jsonl").stat().st_size
        return outcome if report == _report(outcome, source, size) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def hash_of(path: Path) -> str:
    """XXH3 (128 bits) of a file as it is on disk, as ``xxhsum -H2`` gives it: guards against chance, not malice."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
