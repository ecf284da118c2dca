"""Files of raw rows: what they are, by content, and their rows as blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from router_tuning.data.array import ArrayReader, separator_of
from router_tuning.data.blocks import BOM, SPACE, Block, Place, Typed, Unreadable, parse_slowly
from router_tuning.data.lines import line_blocks
from router_tuning.data.streams import compression_of, open_bytes, reading
from router_tuning.errors import UserError

HEAD_BYTES = 1 << 20
BEGINNING = Place()
LINES, ARRAY, PARQUET, ARROW = "lines", "array", "parquet", "arrow"
TABLES = {b"PAR1": PARQUET, b"ARROW1": ARROW, b"\xff\xff\xff\xff": ARROW}


@dataclass(frozen=True)
class Container:
    """A file and what it is. ``separator``: the bytes between two rows, of a file that may be cut there."""

    path: Path
    kind: str
    compressed: bool
    separator: bytes = b""

    @property
    def is_table(self) -> bool:
        """Whether places in it are rows rather than bytes."""
        return self.kind in (PARQUET, ARROW)

    @property
    def can_be_cut(self) -> bool:
        """Whether it is a plain text with a known separator."""
        return bool(self.separator) and not self.compressed


def recognise(path: Path) -> Container:
    """Find out by content what a file is; raises :class:`UserError` for what holds no rows."""
    with reading(path):
        compressed = compression_of(path) is not None
        with open_bytes(path) as stream:
            head = stream.read(HEAD_BYTES)
    table = next((kind for magic, kind in TABLES.items() if head.startswith(magic)), None)
    if table:
        if compressed:
            raise UserError(f"{path} is a compressed {table} file; decompress it first")
        return Container(path, table, False)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16; convert it to UTF-8 first")
    text = head.removeprefix(BOM).lstrip(SPACE)
    if not text:
        raise UserError(f"{path} is empty" if len(head) < HEAD_BYTES else f"{path} starts with 1 MiB of white space")
    if text.startswith(b"[") and not _is_lines(text):
        return Container(path, ARRAY, compressed, separator_of(head))
    return Container(path, LINES, compressed, b"\n")


def _is_lines(text: bytes) -> bool:
    """Whether what begins with a bracket is lines, the first one a faulty row: the first two are JSON values."""
    lines = [line for line in text.split(b"\n") if line.strip(SPACE)][:2]
    return len(lines) == 2 and not any(isinstance(parse_slowly(line), Unreadable) for line in lines)


def read_blocks(
    container: Container,
    columns: Sequence[str],
    start: Place = BEGINNING,
    stop: int | None = None,
    typed: Typed | None = None,
) -> Iterator[Block]:
    """Blocks of the rows from ``start`` to the place ``stop`` (None: to the end), which must be the end of a row.

    Of a table only ``columns`` are read; of a text ``typed`` reads what it can. Raises :class:`UserError` for a file
    that cannot be read to its end.
    """
    path = container.path
    with reading(path):
        if container.is_table:
            from router_tuning.data.tables import table_blocks  # pyarrow takes 60 MB, which only tables need

            yield from table_blocks(path, container.kind == PARQUET, columns, start, stop)
            return
        if container.kind == LINES:
            with open_bytes(path, start.offset, stop) as stream:
                yield from line_blocks(stream, start, typed)
            return
        # From the byte before, which tells whether the array goes on.
        with open_bytes(path, max(0, start.offset - 1), stop) as stream:
            yield from ArrayReader(stream, start, str(path), container.separator, stop is None, typed).blocks()
