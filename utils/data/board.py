"""What the workers of a run tell one another: numbers in memory that all of them share, each with one writer.

Every data set has a flag that ends the work on it, and one entry more than stretches. An entry says what lies before
a stretch, or behind the last one: rows, lines, bytes of output. A worker reads the entry before its stretch and fills
the one behind it, so that the next stretch can be numbered, and written to its place, by another worker.
"""

from __future__ import annotations

import time
from multiprocessing.sharedctypes import RawArray

UNKNOWN = -1
FIELDS = ROWS, LINES, DATA, REJECTS, READ = range(5)
"""Of an entry: rows of the data set, lines of the file, bytes of the two output files; ``READ``: rows of the stretch
before it that are converted so far, for show."""

WAIT_SECONDS = 0.0005
_STOP = 0


class Stopped(Exception):
    """The work on a data set, or on all of them, is over for another reason."""


class Board:
    """Numbers of ``runs`` data sets with ``entries`` entries in all; it goes to workers when they are started."""

    def __init__(self, runs: int, entries: int) -> None:
        # Without a lock, which a worker that is killed would take with it: whole numbers are written in one step.
        self._cells = RawArray("q", 1 + runs + entries * len(FIELDS))
        self._first = 1 + runs
        self.clear(0, entries)

    def clear(self, first: int, count: int) -> None:
        """Forget what some entries say."""
        for cell in range(self._cell(first, 0), self._cell(first + count, 0)):
            self._cells[cell] = UNKNOWN

    def put(self, entry: int, field: int, value: int) -> None:
        """Fill a field in."""
        self._cells[self._cell(entry, field)] = value

    def get(self, entry: int, field: int) -> int:
        """A field as it is now."""
        return self._cells[self._cell(entry, field)]

    def wait(self, run: int, entry: int, field: int) -> int:
        """A field as soon as somebody has filled it in; raises :class:`Stopped` if it does not come to that."""
        while (value := self.get(entry, field)) == UNKNOWN:
            self.check(run)
            time.sleep(WAIT_SECONDS)
        return value

    def read(self) -> int:
        """Rows converted so far, of all stretches that are on the board."""
        return sum(max(count, 0) for count in self._cells[self._cell(0, READ) :: len(FIELDS)])

    def stop(self, run: int | None = None) -> None:
        """End the work on a data set, or on all."""
        self._cells[_STOP if run is None else 1 + run] = 1

    @property
    def over(self) -> bool:
        """Whether all work is to end."""
        return bool(self._cells[_STOP])

    def allow(self, run: int) -> None:
        """Take back that a data set is stopped."""
        self._cells[1 + run] = 0

    def check(self, run: int) -> None:
        """Raise :class:`Stopped` if the work on a data set is to end."""
        if self.over or self._cells[1 + run]:
            raise Stopped

    def _cell(self, entry: int, field: int) -> int:
        return self._first + entry * len(FIELDS) + field
