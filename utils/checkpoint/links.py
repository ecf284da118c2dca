"""Folders that appear whole or not at all, and shards that are linked instead of copied."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from router_tuning.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@contextmanager
def new_folder(target: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` that takes its name when the block ends without an error.

    An existing ``target`` is replaced only with ``overwrite`` and only if it is empty or holds ``marker`` (a file
    that our own output always has), so that a wrong path cannot erase a stranger's folder.
    """
    if target.exists():
        if not target.is_dir():
            raise UserError(f"{target} is a file; name a folder")
        if any(target.iterdir()):
            if not overwrite:
                raise UserError(f"{target} exists; pass --overwrite to replace it or name another folder")
            if not (target / marker).is_file():
                raise UserError(f"{target} holds no {marker}, so it is none of our exports; name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = staged.with_name(staged.name + ".old")
    try:
        yield staged
        _ordinary_permissions(staged)
        if target.exists():
            target.rename(old)
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _ordinary_permissions(folder: Path) -> None:
    """Temporary folders and safetensors files are made for their owner alone; linked files are not ours to change."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o777 & ~umask)
        elif not path.is_symlink() and path.stat().st_nlink == 1:
            path.chmod(0o666 & ~umask)


def link(source: Path, target: Path) -> str:
    """Make ``target`` the same file as ``source``: a hard link, or a symbolic one across file systems.

    Returns ``"hard"`` or ``"symbolic"``.
    """
    source = source.resolve()
    try:
        os.link(source, target)
        return "hard"
    except OSError:
        target.symlink_to(source)
        return "symbolic"


def weight_map(folder: Path) -> dict[str, Path]:
    """``{tensor name: safetensors file}`` of a checkpoint folder, whether one file or an index over shards.

    Raises :class:`UserError` for a folder without safetensors (pickled weights are never read), a damaged file, an
    index that names a file outside the folder, or a missing shard.
    """
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(tensor_names(folder / WEIGHTS), folder / WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder}: neither {WEIGHTS} nor {INDEX}; bring safetensors weights (pickles are not read)")
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: str(file) for name, file in names.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not a weight index ({error!r})") from None
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: {file!r} is no safetensors file of this folder; refusing to follow it")
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: missing shard; bring the base again")
    return {name: folder / file for name, file in files.items()}


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in one safetensors file; :class:`UserError` if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise UserError(f"{path}: not a valid safetensors file ({error})") from None
