"""Files of raw rows: what they are, by content, and their rows. Every way to fail is one clear line."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from router_tuning.data.acceptance import Reject
from router_tuning.data.json_rows import SPACE, Rows, element_rows, line_rows, parse
from router_tuning.errors import UserError

BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 20
BUFFER = 1 << 18
LINES, ARRAY, VALUES, PARQUET, ARROW = "lines", "array", "values", "parquet", "arrow"
COMPRESSIONS = {rb"\x1f\x8b": "gzip", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": "zstd"}
"""How compressed files begin; those of zstandard also with a frame to skip, as all that pzstd makes do."""

TABLES = {b"PAR1": PARQUET, b"ARROW1": ARROW, b"\xff\xff\xff\xff": ARROW}
FOREIGN = {
    rb"BZh[1-9]1AY": "bzip2",
    rb"\xfd7zXZ": "xz",
    rb"PK\x03\x04": "zip",
    rb"(?s).{257}ustar": "tar",
    rb"\x1f\x8b|\x28\xb5\x2f\xfd": "doubly compressed",
}
"""How files begin that are not read, and would be taken for text."""

_WIDE = re.compile(rb"\xff\xfe|\xfe\xff|[\[{\s]\0|\0[\[{\s]")


@dataclass(frozen=True)
class Container:
    """A file, how its rows are laid out, and how it is compressed (None: not at all)."""

    path: Path
    layout: str
    compression: str | None = None

    def rows(self, columns: Sequence[str]) -> Rows:
        """Line (of a table: number) and value of each row, or the :class:`Reject` that says why it has none.

        Of a table, ``columns`` are read. Raises :class:`UserError` if the file cannot be read to its end.
        """
        with reading(self.path):
            if self.layout in TABLES.values():
                from router_tuning.data.columnar import table_rows  # pyarrow takes 60 MB, which only tables need

                yield from table_rows(self.path, self.layout == PARQUET, columns)
                return
            with open_bytes(self.path, self.compression) as stream:
                if stream.peek(len(BOM))[: len(BOM)] == BOM:
                    stream.read(len(BOM))
                if self.layout == LINES:
                    yield from line_rows(stream)
                else:
                    yield from element_rows(stream, str(self.path), self.layout == ARRAY)


def recognise(path: Path) -> Container:
    """Find out by content what a file is; raises :class:`UserError` if it holds no rows that can be read."""
    with reading(path):
        with path.open("rb") as raw:
            head = raw.read(4)
        compression = next((name for magic, name in COMPRESSIONS.items() if re.match(magic, head)), None)
        with open_bytes(path, compression) as stream:
            head = stream.read(HEAD_BYTES)
    table = next((layout for magic, layout in TABLES.items() if head.startswith(magic)), None)
    if table and compression:
        raise UserError(f"{path} is a compressed {table} file; decompress it first")
    if foreign := next((name for magic, name in FOREIGN.items() if re.match(magic, head)), None):
        raise UserError(f"{path} is a {foreign} file, which is not read here; unpack or convert it first")
    if not table and _WIDE.match(head):
        raise UserError(f"{path} is UTF-16; convert it to UTF-8 first")
    text = head.removeprefix(BOM).lstrip(SPACE)
    if not text:
        raise UserError(f"{path} is empty" if len(head) < HEAD_BYTES else f"{path} starts with 1 MiB of white space")
    return Container(path, table or _layout(text), compression)


def _layout(head: bytes) -> str:
    """How rows are laid out in a JSON text that starts like this."""
    lines = [line for line in head.split(b"\n") if line.strip(SPACE)][:2]
    sound = [not isinstance(parse(line), Reject) for line in lines]
    if head.startswith(b"["):
        return LINES if sound == [True, True] else ARRAY  # of lines the first of which is a faulty row
    if sound[0]:
        return LINES
    text = head.decode("utf-8", "replace")
    try:
        first = text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return LINES
    return VALUES if "\n" in first else LINES


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while ``path`` is read into a :class:`UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except EOFError:
        raise UserError(f"{path} is truncated: the compressed data break off; fetch the file again") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not a library's
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        raise UserError(f"{path} is truncated or damaged: {reason}; fetch the file again") from None


@contextmanager
def open_bytes(path: Path, compression: str | None) -> Iterator[io.BufferedReader]:
    """The decompressed bytes of a file."""
    with path.open("rb", BUFFER) as raw:
        if compression is None:
            yield raw
        elif compression == "gzip":
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw))
        else:
            # Unlike that of zstandard itself, this reader tells a truncated stream from a finished one.
            import pyarrow

            with pyarrow.CompressedInputStream(raw, "zstd") as stream:
                yield io.BufferedReader(stream)
