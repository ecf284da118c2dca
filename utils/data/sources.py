"""Where the rows of a data set are: a file, a folder as people and the hub lay them out, or an id on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from router_tuning.data.containers import reading
from router_tuning.data.formats import FORMATS
from router_tuning.errors import UserError
from router_tuning.places import is_hub_id

METADATA = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"})
"""What the hub and ``datasets`` put beside the data."""

_KINDS = ("json", "jsonl", "ndjson", "parquet", "arrow")
_DATA_FILE = re.compile(rf"(.+)\.({'|'.join(_KINDS)})(?:\.(?:gz|zst))?")
_WANTED = ".json, .jsonl, .ndjson, .parquet or .arrow, alone or with .gz or .zst"
_SPLIT = re.compile(r"(?:^|[^a-z])(train|test|validation|valid|val|dev|eval)(?:[^a-z]|$)")


@dataclass(frozen=True)
class Source:
    """The files of a data set in the order of their rows; ``root`` is what rejects name them relative to."""

    name: str
    files: tuple[Path, ...]
    root: Path

    def shown(self, path: Path) -> str:
        """A file's name as it is reported, which JSON must be able to hold."""
        name = str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def locate(name: str, raw_data_root: Path) -> Path | None:
    """The folder of a data set under the root, or the file: ``<name>/`` or ``<name>.<suffix>``."""
    if (raw_data_root / name).exists():
        return raw_data_root / name
    found = [(path, _DATA_FILE.fullmatch(path.name)) for path in raw_data_root.glob(f"{name}.*")]
    files = [(_KINDS.index(match[2]), path) for path, match in found if match and match[1] == name]
    return min(files)[1] if files else None


def source_of(name: str, given: str | Path) -> Source:
    """The files of a data set at a path, or on the hub; raises :class:`UserError` where there are none."""
    path = Path(given)
    if path.is_file():
        return Source(name, (path,), path.parent)
    if path.is_dir():
        with reading(path):
            return Source(name, tuple(_files_of(name, path)), path)
    if isinstance(given, str) and is_hub_id(given):
        return Source(name, tuple(_hub_files(given)), path)
    raise UserError(f"{name}: {given} is no file, no folder and no hub id (owner/name)")


def _files_of(name: str, folder: Path) -> list[Path]:
    folder = _snapshot(folder)
    published = FORMATS[name].raw_file.split(".json")[0]
    found = [(path, _DATA_FILE.fullmatch(path.name)) for path in sorted(folder.rglob("*")) if path.is_file()]
    found = [(path, match) for path, match in found if match and "/." not in f"/{path.relative_to(folder).as_posix()}"]
    exact = [path for path, match in found if match[1] == published and path.parent == folder]
    if len(exact) > 1:
        names = " and ".join(path.name for path in exact)
        raise UserError(f"{name}: {names} look like the same data twice; say which: --source {name}=FILE")
    if exact:
        return exact
    kinds = {path: "json" if "json" in match[2] else match[2] for path, match in found if path.name not in METADATA}
    if not kinds:
        raise UserError(f"{name}: {folder} holds no data file ({_WANTED})")
    if len(set(kinds.values())) > 1:
        raise UserError(
            f"{name}: {folder} holds {' and '.join(sorted(set(kinds.values())))} files, perhaps the same rows twice; "
            f"say which to read: --source {name}=FILE_OR_FOLDER"
        )
    return _training_files(name, folder, list(kinds))


def _snapshot(folder: Path) -> Path:
    """The current snapshot of a hub cache folder (``refs/main``, ``snapshots/<commit>/``); else the folder itself."""
    head = folder / "refs" / "main"
    if not head.is_file():
        return folder
    snapshot = folder / "snapshots" / head.read_text(encoding="utf-8").strip()
    return snapshot if snapshot.is_dir() else folder


def _training_files(name: str, folder: Path, files: list[Path]) -> list[Path]:
    """Without the files of other splits, as their names tell them."""
    splits = {path: _SPLIT.search(str(path.relative_to(folder)).lower()) for path in files}
    training = [path for path, split in splits.items() if split and split[1] == "train"]
    chosen = training or [path for path, split in splits.items() if not split]
    if not chosen:
        raise UserError(f"{name}: {folder} holds only test or validation files; the training split is needed")
    return chosen


def _hub_files(hub_id: str) -> list[Path]:
    """The training split of a data set on the hub, as the Arrow files that ``datasets`` keeps of it."""
    from datasets import load_dataset  # takes seconds to import, and only hub ids need it

    try:
        split = load_dataset(hub_id, split="train")
    # The library raises errors of its own, of the hub client, of the builder and of fsspec; all mean the same here.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{hub_id} cannot be loaded from the hub: {type(error).__name__}: {reason}") from None
    return [Path(file["filename"]) for file in split.cache_files]
