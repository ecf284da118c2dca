"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while something is written under ``folder`` into a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from None


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content in one step: readers, and whoever comes after a kill, see the old or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


class Behind:
    """A file that a thread writes while its user makes the next bytes; what goes wrong is raised at a later call.

    To be used as a context, which ends with everything written that was not refused.
    """

    BATCH_BYTES = 1 << 20
    BATCHES = 8

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._thread = file, ThreadPoolExecutor(1)
        self._waiting: list[bytes] = []
        self._size = 0
        self._begun: deque[Future] = deque()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self._begin()
        self._thread.shutdown(wait=True)

    def write(self, data: bytes) -> None:
        """Have bytes written, after those of earlier calls."""
        self._waiting.append(data)
        self._size += len(data)
        if self._size >= self.BATCH_BYTES:
            self._begin()
        if len(self._begun) > self.BATCHES:
            self._begun.popleft().result()

    def flush(self) -> None:
        """Come back when everything is written."""
        self._begin()
        while self._begun:
            self._begun.popleft().result()
        self._file.flush()

    def _begin(self) -> None:
        if self._waiting:
            self._begun.append(self._thread.submit(self._write, self._waiting))
            self._waiting, self._size = [], 0

    def _write(self, batch: list[bytes]) -> None:
        self._file.write(b"".join(batch))
