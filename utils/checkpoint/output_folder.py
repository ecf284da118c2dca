"""Where an export goes: a folder that appears whole or not at all, and never in a stranger's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from router_tuning.errors import UserError
from router_tuning.files import publish


@contextmanager
def new_folder(target: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``target`` when the block ends without an error.

    Args:
        overwrite: replace what is there, if it holds ``marker``.
        marker: a file that our own output always has, so that a wrong path cannot erase a stranger's folder.

    Raises:
        UserError: for a target that may not be replaced, or cannot be written.
    """
    if target.exists():
        if not target.is_dir():
            raise UserError(f"{target} is a file; name a folder")
        if any(target.iterdir()):
            if not overwrite:
                raise UserError(f"{target} exists; pass --overwrite to replace it or name another folder")
            if not (target / marker).is_file():
                raise UserError(f"{target} holds no {marker}, so it is none of our exports; name another folder")
    with publish(target) as draft:
        draft.mkdir()
        yield draft
