"""One data set on its way from raw files to its published folder."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from router_tuning.data.board import DATA, LINES, REJECTS, ROWS, Board
from router_tuning.data.containers import Container
from router_tuning.data.conversion import State, Task
from router_tuning.data.planning import Plan, Stretch, cut_file
from router_tuning.data.policy import FILTERED
from router_tuning.data.progress import Progress
from router_tuning.data.sources import Source
from router_tuning.data.writing import replace_file, writing

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
    """Stretches of a data set, handed out one after the other, and what became of them.

    ``number`` is that of the data set on the board.
    """

    def __init__(self, source: Source, folder: Path, number: int = 0) -> None:
        self.source, self.folder, self.partial, self.number = source, folder, folder / ".partial", number
        self.outcome = Outcome(source.name)
        self._progress = Progress(self.partial)
        self._set(Plan([]))

    def _set(self, plan: Plan, states: Sequence[State] = (), begun: State | None = None) -> None:
        """Take up a plan of which an earlier run has done the first stretches, and the next one in part."""
        self._plan, self._begun = plan, {len(states): begun}
        self._states = [*states, *[None] * (len(plan.stretches) - len(states))]
        self._next = self._complete = len(states)

    @property
    def is_cut(self) -> bool:
        """Whether the plan has parts of files in it."""
        return any(stretch.stop is not None for stretch in self._plan.stretches)

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.outcome.error is not None or self.outcome.resumed or self._complete == len(self._states)

    @property
    def entries(self) -> int:
        """How many it needs on the board."""
        return len(self._states) + 1

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
        """Take up what a killed run left, if that was for these files as they are now."""
        with writing(self.folder):
            left = self._progress.load(containers)
        if left is None:
            return False
        self._set(*left)
        return True

    def start(self, containers: Sequence[Container]) -> None:
        """Begin anew, with the files cut into stretches."""
        self._start(Plan([stretch for container in containers for stretch in cut_file(container)]))

    def start_whole(self) -> None:
        """Begin anew, file after file: their rows are not what stands between separators."""
        containers = dict.fromkeys(stretch.container for stretch in self._plan.stretches)
        self._start(Plan([Stretch(container) for container in containers], counting=False))
        self.show(self._board, self._first_entry)

    def _start(self, plan: Plan) -> None:
        with writing(self.folder):
            self._progress.begin(plan)
        self._set(plan)

    def show(self, board: Board, first: int) -> None:
        """Put on the board, from entry ``first`` on, what is known so far: what lies before the next stretch."""
        self._board, self._first_entry = board, first
        board.clear(first, self.entries)
        done = [state for state in self._states if state]
        entry = first + len(done)
        board.put(entry, ROWS, sum(state.rows for state in done))
        board.put(entry, LINES, done[-1].place.line if done else 0)
        board.put(entry, DATA, sum(state.data_size for state in done))
        board.put(entry, REJECTS, sum(state.rejects_size for state in done))

    def next_task(self, alone: bool) -> Task | None:
        """The next stretch, if it can be worked on now; each is handed out once.

        ``alone``: there is one worker, so that all stretches before are done when it comes to this one.
        """
        number = self._next
        if number == len(self._states):
            return None
        if number and not (alone or self._states[number - 1] or self._counted(number - 1)):
            return None
        self._next += 1
        stretch = self._plan.stretches[number]
        return Task(
            name=self.source.name,
            stretch=stretch,
            number=number,
            folder=self.partial,
            shown=self.source.shown(stretch.container.path),
            run=self.number,
            entry=self._first_entry + number,
            counting=not alone and self._counted(number) and stretch.rows is None,
            begun=self._begun.get(number),
        )

    def _counted(self, number: int) -> bool:
        """Whether the rows of a stretch are known before it is converted; nobody needs to know those of the last."""
        stretch = self._plan.stretches[number]
        if number + 1 == len(self._states) or not self._plan.counting:
            return False
        return stretch.rows is not None or stretch.can_be_counted

    def finish(self, number: int, state: State) -> None:
        """Take the result of a stretch, and note down what is complete from the first stretch on."""
        self._states[number] = state
        with writing(self.folder):
            while self._complete < len(self._states) and self._states[self._complete]:
                self._progress.add(self._states[self._complete])
                self._complete += 1

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
                {"file": self.source.shown(path), "bytes": path.stat().st_size, "xxh3_128": digest}
                for path, digest in files
            ],
        }
