"""Files of raw rows: what they are by content, and their rows as blocks."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.data.array import ArrayReader
from utils.data.blocks import BOM, Block, Place
from utils.data.lines import line_blocks
from utils.errors import UserError


def open_bytes(path: Path) -> BinaryIO:
    raw = path.open("rb")
    magic = raw.read(4)
    raw.seek(0)
    return io.BufferedReader(gzip.GzipFile(fileobj=raw)) if magic[:2] == b"\x1f\x8b" else raw


def blocks(path: Path, start: Place) -> Iterator[Block]:
    with open_bytes(path) as stream:
        head = stream.read(4096).removeprefix(BOM).lstrip()
        stream.seek(start.offset)
        if head.startswith(b"["):
            yield from ArrayReader(stream, start, str(path)).blocks()
        else:
            yield from line_blocks(stream, start)


def data_files(folder: Path, published: str) -> list[Path]:
    exact = folder / published
    if exact.is_file():
        return [exact]
    files = [
        path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".jsonl", ".gz") and path.is_file()
    ]
    if not files:
        raise UserError(f"{folder} holds no data file")
    return files
