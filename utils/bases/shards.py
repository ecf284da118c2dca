"""The files of a checkpoint folder: weights are read by their headers, and brought elsewhere by copy or by link."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from router_tuning.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL_FILES = (
    "tokenizer* special_tokens_map.json added_tokens.json vocab* merges.txt chat_template* generation_config.json"
).split()
"""Patterns of what a checkpoint has beside its weights and configuration."""


def weight_map(folder: Path) -> dict[str, Path]:
    """``{tensor name: safetensors file}`` of a checkpoint folder, whether one file or an index over shards.

    Raises:
        UserError: for a folder without safetensors (pickled weights are never read), a damaged file, an index that
            names a file outside the folder, or a shard that is missing or links to nothing.
    """
    lone, index = folder / WEIGHTS, folder / INDEX
    if lone.exists() or lone.is_symlink():
        return dict.fromkeys(tensor_names(lone), lone)
    if not index.is_file():
        raise UserError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{_instead(folder)}")
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: str(file) for name, file in names.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is no weight index ({error!r})") from None
    found: dict[str, Path] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index} names {file!r}, which is no safetensors file of this folder")
        found |= dict.fromkeys(tensor_names(folder / file), folder / file)
    if lost := sorted(set(files) - set(found)):
        raise UserError(f"{index} names {lost[0]}, which is in none of its shards")
    return {name: folder / file for name, file in files.items()}


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in one safetensors file; :class:`UserError` if it is missing or not whole."""
    with _opened(path) as file:
        return list(file.keys())


def tensor_shapes(files: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of :func:`weight_map`; only headers are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def row_reader(folder: Path) -> Callable[[str, slice], Tensor | None]:
    """Reads rows of a weight by its name, from the shards of a folder; None for a name that they lack."""
    files = weight_map(folder)

    def read(name: str, rows: slice) -> Tensor | None:
        if name not in files:
            return None
        with _opened(files[name]) as file:
            return file.get_slice(name)[rows]

    return read


def small_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template and generation settings."""
    return [path for pattern in SMALL_FILES for path in sorted(folder.glob(pattern)) if path.is_file()]


def bring(source: Path, target: Path, link: bool = False) -> int:
    """Make ``target`` what ``source`` is, and return how many bytes were copied.

    A copy shares the blocks of the original where the file system can do that (XFS, Btrfs, …), so that it costs
    neither time nor space and still stands alone. A hard link would let whoever edits one file edit both.
    """
    source = source.resolve(strict=True)
    if link:
        target.symlink_to(source)
        return 0
    try:
        with source.open("rb") as there, target.open("wb") as here:
            while os.copy_file_range(there.fileno(), here.fileno(), 1 << 30):
                pass
    except (AttributeError, OSError):  # another file system, or one without this call
        shutil.copyfile(source, target)
    shutil.copystat(source, target)
    return target.stat().st_size


def _opened(path: Path):
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} links to {os.readlink(path)}, which is gone: bring it back, or the weights anew")
    if not path.is_file():
        raise UserError(f"{path} is missing: bring the weights anew")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error})") from None


def _instead(folder: Path) -> str:
    """What to say of a folder that holds other weights."""
    if other := sorted(path.name for path in folder.glob("*.gguf")):
        return f": name its file {folder / other[0]}"
    if other := sorted(path.name for path in folder.glob("*.bin")):
        return f": {other[0]} is a pickle, which is never loaded; convert it to safetensors"
    return ""
