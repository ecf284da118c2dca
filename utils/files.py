"""Files and folders that are there as a whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from router_tuning.errors import UserError

PREFIX = ".partial."
"""How the names of scratch folders begin."""


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield a path of the same name in a scratch folder; what the block makes there takes its place at the end.

        with publish(folder / "scores.json") as draft:
            draft.write_text(…)

    It may be a file or a folder, and gets the modes that new files usually have. Whoever reads ``target``, also after
    a kill, sees the old or the new content; after an exception the old one is still there. (An old *folder* is moved
    away first: a kill between the two renames leaves neither.)

    Args:
        target: the file or folder to make; folders above it are made, too.

    Raises:
        UserError: if the system refuses to write, as on a full disk.
    """
    with scratch_folder(target.parent) as scratch, writing(target):
        draft = scratch / target.name
        yield draft
        _usual_modes(draft, scratch.stat().st_mode)
        if draft.is_dir() and target.exists():
            os.replace(target, scratch / f"{target.name}.old")
        os.replace(draft, target)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty hidden folder in ``parent`` that is removed at the end.

    What a killed process has left there is removed at the beginning. A lock on each folder tells it from that of a
    process which is still at work.

    Raises:
        UserError: if the system refuses to make it.
    """
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        parent_lock = _lock(parent, wait=True)
        try:
            _sweep(parent)
            folder = parent / f"{PREFIX}{secrets.token_hex(4)}"
            folder.mkdir()
            lock = _lock(folder)
        finally:
            _unlock(parent_lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the system says while ``target`` is written into a :class:`UserError` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a library's, which speaks of something else
            raise
        known = error.filename is None or PREFIX in str(error.filename) or str(error.filename) == str(target)
        reason = error.strerror if known else f"{error.strerror} ({error.filename})"
        raise UserError(f"{target} cannot be written: {reason}") from None


def write_text(path: Path, text: str) -> Path:
    """Publish a text file; returns its path."""
    with publish(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, content: Any) -> Path:
    """Publish ``content`` as indented JSON; returns its path."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def _usual_modes(draft: Path, mode: int) -> None:
    """Some libraries make files for their owner alone; files that are linked from elsewhere are not ours to change."""
    for path in (draft, *draft.rglob("*")):
        if path.is_symlink():
            continue
        if path.is_dir():
            path.chmod(mode & 0o777)
        elif path.stat().st_nlink == 1:
            path.chmod(path.stat().st_mode & 0o111 | mode & 0o666)


def _sweep(parent: Path) -> None:
    for left in parent.glob(f"{PREFIX}*"):
        lock = _lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            _unlock(lock)


def _lock(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder; None where another process has it locked, or where there are no locks."""
    handle = None
    try:
        import fcntl  # Windows has none

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        _unlock(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
