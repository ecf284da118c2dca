"""What a run keeps of its progress, so that another one can go on behind it.

``plan.json`` says what the stretches are, ``journal.jsonl`` has a line for each one that is complete like all before
it, and ``checkpoint.json`` says how far the next one came. What the output files hold beyond that is cut off: it may
have gaps.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import orjson

from router_tuning.data.containers import Container
from router_tuning.data.conversion import CHECKPOINT, State
from router_tuning.data.planning import Plan
from router_tuning.data.writing import replace_file

Left = tuple[Plan, list[State], State | None]
"""The plan, states of the stretches that are complete, and of the next one if it was begun."""


class Progress:
    """Of one data set, in its folder. OSError if that cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = folder / "journal.jsonl"
        self._checkpoint = folder / CHECKPOINT
        self._outputs = (folder / "data.jsonl", folder / "rejects.jsonl")

    def begin(self, plan: Plan) -> None:
        """Forget everything, and note down a plan."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for path in (*self._outputs, self._journal):
            path.write_bytes(b"")
        replace_file(self._folder / "plan.json", orjson.dumps(plan.as_json()))

    def add(self, state: State) -> None:
        """Note down that the next stretch is complete."""
        with self._journal.open("ab") as journal:
            journal.write(orjson.dumps(asdict(state), option=orjson.OPT_APPEND_NEWLINE))

    def load(self, containers: Sequence[Container]) -> Left | None:
        """What an earlier run left for these files as they are now, with the output cut to that; None if nothing."""
        try:
            plan = Plan.of(orjson.loads((self._folder / "plan.json").read_bytes()), containers)
            sizes = [os.path.getsize(path) for path in self._outputs]
            *lines, _ = self._journal.read_bytes().split(b"\n")  # what a kill cut short is not a line
            states = [State.of(orjson.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        begun = self._begun(len(states))
        good = [*states, begun] if begun else states
        ends = [sum(state.data_size for state in good), sum(state.rejects_size for state in good)]
        if plan is None or any(size < end for size, end in zip(sizes, ends, strict=True)):
            return None
        ends.append(sum(len(line) + 1 for line in lines))
        for path, end in zip((*self._outputs, self._journal), ends, strict=True):
            os.truncate(path, end)
        if begun is None:
            # One that is not for the next stretch would come to speak of bytes that are written anew.
            self._checkpoint.unlink(missing_ok=True)
        return plan, states, begun

    def _begun(self, number: int) -> State | None:
        try:
            saved = orjson.loads(self._checkpoint.read_bytes())
            return State.of(saved["state"]) if saved["number"] == number else None
        except (OSError, ValueError, TypeError, KeyError):
            return None
