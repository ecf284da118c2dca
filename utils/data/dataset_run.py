"""One data set on its way from raw files to its published folder."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from utils.data.containers import Container
from utils.data.conversion import State, Task
from utils.data.planning import Unit, plan_of, resumed_units, whole_files
from utils.data.policy import FILTERED
from utils.data.sources import Source
from utils.data.writing import replace_file, writing

COPY_BYTES = 1 << 20
PRETTY = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


@dataclass
class Outcome:
    """What became of a data set: rows read, accepted, left out by reason; ``error``: why it was not published."""

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


class DatasetRun:
    """Units of a data set, handed out as tasks as soon as the number of their first row is known."""

    def __init__(self, source: Source, folder: Path) -> None:
        self.source, self.folder, self.partial = source, folder, folder / ".partial"
        self.outcome = Outcome(source.name)
        self._units: list[Unit] = []
        self._states: list[State | None] = []
        self._next = self._first_row = self._joined = 0

    @property
    def total(self) -> int | None:
        """Rows of the data set, where all units are counted."""
        counts = [unit.rows for unit in self._units]
        return None if None in counts else sum(counts)

    @property
    def is_cut(self) -> bool:
        """Whether the plan has stretches of files in it."""
        return any(unit.stop is not None for unit in self._units)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.outcome.error is not None or self.outcome.resumed or None not in self._states

    def published_before(self) -> bool:
        """Whether the folder already holds the result for these files; then it is this run's outcome, too."""
        try:
            report_path = self.folder / "reformat.json"
            report = orjson.loads(report_path.read_bytes())
            made = report_path.stat().st_mtime_ns
            known = [(source["file"], source["bytes"]) for source in report["sources"]]
            here = [(self.source.shown(path), path.stat().st_size) for path in self.source.files]
            newer = any(path.stat().st_mtime_ns > made for path in self.source.files)
            if newer or known != here or (self.folder / "data.jsonl").stat().st_size != report["bytes"]:
                return False
            self.outcome = Outcome(self.source.name, report["rows"], report["accepted"], report["left_out"], True)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        # A run that is killed while it tidies up leaves the rest to this one.
        shutil.rmtree(self.partial, ignore_errors=True)
        return True

    def resume(self, containers: Sequence[Container]) -> bool:
        """Take up the plan of a killed run, if it was for these files as they are now."""
        try:
            units = resumed_units(orjson.loads((self.partial / "plan.json").read_bytes()), containers)
        except (OSError, ValueError):
            return False
        self._set(units or [])
        return bool(units)

    def start(self, units: Sequence[Unit]) -> None:
        """Begin anew with these units."""
        with writing(self.folder):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            replace_file(self.partial / "plan.json", orjson.dumps(plan_of(units)))
        self._set(units)

    def _set(self, units: Sequence[Unit]) -> None:
        self._units, self._states = list(units), [None] * len(units)
        self._next = self._first_row = self._joined = 0

    def ready(self) -> list[Task]:
        """The tasks that can start now, each handed out once."""
        tasks = []
        while self._next < len(self._units):
            number = self._next
            if number and self._units[number - 1].rows is None:
                before = self._states[number - 1]
                if before is None:
                    break
                self._first_row += before.rows
            elif number:
                self._first_row += self._units[number - 1].rows
            unit = self._units[number]
            shown = self.source.shown(unit.container.path)
            tasks.append(Task(self.source.name, unit, number, self._first_row, self.partial, shown))
            self._next += 1
        return tasks

    def finish(self, number: int, state: State) -> bool:
        """Take the result of a unit; False if its rows are not as many as counted, so that ids behind it are wrong."""
        expected = self._units[number].rows
        if expected is not None and expected != state.rows and number + 1 < len(self._units):
            return False
        self._states[number] = state
        self._join()
        return True

    def start_uncounted(self) -> None:
        """Begin anew without counts, file after file."""
        self.start(whole_files(list(dict.fromkeys(unit.container for unit in self._units))))

    def _join(self) -> None:
        """Append what is complete, in order, while other units are still being converted."""
        with writing(self.partial):
            while self._joined < len(self._states) and self._states[self._joined] is not None:
                for kind in ("data", "rejects"):
                    self._append(kind, fresh=self._joined == 0)
                self._joined += 1

    def _append(self, kind: str, fresh: bool) -> None:
        part, whole = self.partial / f"{self._joined:05d}.{kind}", self.partial / f"{kind}.jsonl"
        if len(self._units) == 1 and _linked(part, whole):
            return
        if fresh:
            whole.write_bytes(b"")
        if not _copied(part, whole):
            with part.open("rb") as source, whole.open("ab") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)

    def publish(self, hashes: Sequence[str], max_reject_rate: float, strict: bool) -> None:
        """Move the result to its final names, unless it has no rows or too many rejects; says so in ``outcome``."""
        outcome = self.outcome
        for state in self._states:
            outcome.rows += state.rows
            outcome.accepted += state.accepted
            outcome.reasons = dict(sorted((Counter(outcome.reasons) + Counter(state.reasons)).items()))
        self._judge(max_reject_rate, strict)
        with writing(self.folder):
            os.replace(self.partial / "rejects.jsonl", self.folder / "rejects.jsonl")
            if outcome.error is None:
                report = orjson.dumps(self._report(hashes), option=PRETTY)
                os.replace(self.partial / "data.jsonl", self.folder / "data.jsonl")
                replace_file(self.folder / "reformat.json", report)
                shutil.rmtree(self.partial, ignore_errors=True)

    def _judge(self, max_reject_rate: float, strict: bool) -> None:
        outcome = self.outcome
        where = self.folder / "rejects.jsonl"
        if not outcome.rows:
            outcome.error = f"{outcome.name}: {self.source.root} holds no row"
        elif strict and outcome.reasons:
            left_out, outcome.too_many = sum(outcome.reasons.values()), True
            outcome.error = (
                f"{outcome.name}: --strict, but {left_out} of {outcome.rows} rows are left out; see {where}"
            )
        elif outcome.refused > max_reject_rate * outcome.rows:
            outcome.too_many = True
            outcome.error = (
                f"{outcome.name}: {outcome.refused} of {outcome.rows} rows are refused, more than --max_reject_rate "
                f"{max_reject_rate:g}; see {where}, then mend the data or run again with --resume and a higher rate"
            )
        elif not outcome.accepted:
            outcome.error = f"{outcome.name}: none of {outcome.rows} rows is accepted; see {where}"

    def _report(self, hashes: Sequence[str]) -> dict:
        files = zip(self.source.files, hashes, strict=True)
        return {
            "dataset": self.source.name,
            "rows": self.outcome.rows,
            "accepted": self.outcome.accepted,
            "left_out": self.outcome.reasons,
            "bytes": os.path.getsize(self.partial / "data.jsonl"),
            "sources": [
                {"file": self.source.shown(path), "bytes": path.stat().st_size, "sha256": digest}
                for path, digest in files
            ],
        }


def _copied(part: Path, whole: Path) -> bool:
    """Whether the part could be appended within the system, without passing through this process."""
    with part.open("rb", 0) as source, whole.open("r+b", 0) as target:
        end = target.seek(0, os.SEEK_END)
        try:
            while os.copy_file_range(source.fileno(), target.fileno(), COPY_BYTES):
                pass
        except (AttributeError, OSError):  # not on every system, and not between all files
            pass
        if target.tell() - end == os.path.getsize(part):
            return True
        target.truncate(end)
    return False


def _linked(part: Path, whole: Path) -> bool:
    """Whether the part could be given the name of the whole, which spares a copy; some file systems know no links."""
    whole.unlink(missing_ok=True)
    try:
        os.link(part, whole)
    except OSError:
        return False
    return True
