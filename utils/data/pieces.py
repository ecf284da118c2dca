"""Output that is made before its place in the file is known."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from router_tuning.data.board import UNKNOWN
from router_tuning.data.writing import writing

HELD_BYTES = 16 << 20
WRITE_BYTES = 1 << 18
"""Written at a time: measured, half of it takes longer, as it leaves more pages written in part; much more of it needs
larger stretches of free memory, which the system may have to find first."""


class Piece:
    """Consecutive bytes of a file; ``size`` of them so far, of which the ``size`` given are in the file already.

    What is written while nobody knows where the piece starts is held in memory, and what is too much for it in a file
    without a name, of which a killed run leaves nothing. Raises :class:`WriteError` if the file cannot be written.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self._path, self._placed, self.size = path, size, size
        self._fresh: list[bytes] = []
        self._held: list[bytes] = []
        self._fresh_bytes = self._held_bytes = 0
        self._spilled: BinaryIO | None = None
        with writing(path):
            self._file = path.open("r+b", 0)

    def __enter__(self) -> Piece:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._spilled:
            self._spilled.close()

    def write(self, data: bytes, begin: int) -> None:
        """Append to the piece, which starts at ``begin`` of the file, if that is not UNKNOWN."""
        self._fresh.append(data)
        self._fresh_bytes += len(data)
        self.size += len(data)
        if self._fresh_bytes >= WRITE_BYTES:
            self._gather()
            if begin != UNKNOWN:
                self.place(begin)
            elif self._held_bytes > HELD_BYTES:
                self._spill()

    def place(self, begin: int) -> None:
        """Put all that is held into the file, where the piece starts at ``begin``."""
        self._gather()
        with writing(self._path):
            if self._spilled:
                self._spilled.seek(0)
                while chunk := self._spilled.read(WRITE_BYTES):
                    self._put(chunk, begin)
                self._spilled.close()
                self._spilled = None
            for data in self._held:
                self._put(data, begin)
        self._forget()

    def _gather(self) -> None:
        self._held.append(b"".join(self._fresh))
        self._held_bytes += self._fresh_bytes
        self._fresh.clear()
        self._fresh_bytes = 0

    def _spill(self) -> None:
        with writing(self._path.parent):
            if not self._spilled:
                self._spilled = tempfile.TemporaryFile(dir=self._path.parent)
            self._spilled.writelines(self._held)
        self._forget()

    def _put(self, data: bytes, begin: int) -> None:
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self._file.fileno(), rest, begin + self._placed)
            self._placed += done
            rest = rest[done:]

    def _forget(self) -> None:
        self._held.clear()
        self._held_bytes = 0
