"""Files and folders that are there as a whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from router_tuning.errors import UserError

PREFIX = ".partial"
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
        for left in parent.glob(f"{PREFIX}.*"):
            with suppress(OSError):
                if (lock := _lock(left)) is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(lock)
        unlocked = parent / f"{PREFIX}-{secrets.token_hex(4)}"
        unlocked.mkdir()
        lock = _lock(unlocked)
        folder = unlocked.rename(parent / unlocked.name.replace("-", "."))  # so others find it locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Have a folder, which is made, to oneself among processes that ask for it so.

    Raises:
        UserError: where another one has it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _lock(folder)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is at work there; wait for it, or name another") from None
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the system says while ``target`` is written into a :class:`UserError` that names it."""
    try:
        yield
    except Exception as error:
        reason = _refusal(error, target)
        if reason is None:
            raise
        raise UserError(f"{target} cannot be written: {reason}") from None


def _refusal(error: Exception, target: Path) -> str | None:
    """What the system said, or None where an error speaks of something else."""
    if isinstance(error, OSError) and error.errno is not None:
        known = error.filename is None or PREFIX in str(error.filename) or str(error.filename) == str(target)
        return error.strerror if known else f"{error.strerror} ({error.filename})"
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # of torch.save, which hides the reason
        return "not all of it could be saved, is the disk full?"
    told = re.search(r"I/O error: (.*) \(os error \d+\)", str(error))  # of safetensors
    return told and told[1]


def write_text(path: Path, text: str) -> Path:
    """Publish a text file; returns its path."""
    with publish(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, content: Any) -> Path:
    """Publish ``content`` as indented JSON; returns its path."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: where there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def append_json(path: Path, content: Any) -> None:
    """Append one line of JSON, whole or not at all: beside other processes, on other hosts too, and after a kill."""
    line = json.dumps(content, separators=(",", ":")).encode() + b"\n"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _wait_for(file.fileno())
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # a killed process may have left half a line
            file.write(line)


def read_json_lines(path: Path) -> list[Any]:
    """What :func:`append_json` wrote, without a last line that was cut; nothing where there is no file.

    Raises:
        UserError: for a line that is no JSON, with its number.
    """
    content = path.read_bytes() if path.is_file() else b""
    found = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
    return found


def _usual_modes(draft: Path, mode: int) -> None:
    """Some libraries make files for their owner alone; files that are linked from elsewhere are not ours to change."""
    for path in (draft, *draft.rglob("*")):
        if path.is_symlink():
            continue
        if path.is_dir():
            path.chmod(mode & 0o777)
        elif path.stat().st_nlink == 1:
            path.chmod(path.stat().st_mode & 0o111 | mode & 0o666)


def _wait_for(handle: int) -> None:
    """Lock an open file until it is closed, where there are locks."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX)


def _lock(folder: Path) -> int | None:
    """Lock a folder until its handle is closed; None where there are no locks.

    Raises:
        BlockingIOError: where another process has it locked.
    """
    with suppress(ImportError):
        import fcntl  # Windows has none

        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise
    return None
