"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from router_tuning.errors import UserError


class WriteError(UserError):
    """A result could not be written."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while something is written under ``folder`` into a :class:`WriteError`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from None


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content in one step: readers, and whoever comes after a kill, see the old or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
