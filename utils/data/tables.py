"""Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from router_tuning.data.blocks import Block, Place, Unreadable
from router_tuning.errors import UserError

BATCH_ROWS = 256
READ_BUFFER = 1 << 20


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn what pyarrow says of data that it cannot make sense of into a :class:`UserError` that names the file.

    It also raises OSError for them, which :func:`router_tuning.data.streams.reading` takes care of.
    """
    try:
        yield
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"{path} is truncated or damaged: {reason}; fetch the file again") from None


def parquet_groups(path: Path) -> list[int]:
    """Rows of each row group."""
    with _decoding(path), pq.ParquetFile(path) as file:
        return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]


def arrow_rows(path: Path) -> int:
    """Rows of an Arrow file."""
    with _decoding(path):
        return sum(batch.num_rows for batch in _arrow_batches(path))


def table_blocks(path: Path, parquet: bool, columns: Sequence[str], start: Place, stop: int | None) -> Iterator[Block]:
    """Blocks of the rows ``start.offset`` to ``stop`` of a table, as dicts of those ``columns`` that it has.

    The line of a row is its number in the file, from 1.
    """
    with _decoding(path):
        yield from _blocks(path, parquet, columns, start, stop)


def _blocks(path: Path, parquet: bool, columns: Sequence[str], start: Place, stop: int | None) -> Iterator[Block]:
    batches = _parquet_batches(path, columns, start.offset) if parquet else _arrow_batches(path)
    before = _groups_before(path, start.offset)[1] if parquet else 0
    for batch in batches:
        begin, end = before, before + batch.num_rows
        before = end
        if end <= start.offset:
            continue
        if stop is not None and begin >= stop:
            return
        first, last = max(begin, start.offset), end if stop is None else min(end, stop)
        kept = batch.select([name for name in columns if name in batch.schema.names])
        for low in range(first, last, BATCH_ROWS):
            high = min(low + BATCH_ROWS, last)
            yield _block(kept.slice(low - begin, high - low), low)


def _block(batch: pa.RecordBatch, first: int) -> Block:
    after = Place(first + batch.num_rows, first + batch.num_rows)
    if batch.num_columns:
        rows = _rows(batch)
    else:
        rows = [{} for _ in range(batch.num_rows)]
    return Block(lambda: rows, after, lambda row: first + row + 1)


def _rows(batch: pa.RecordBatch) -> list[object]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_row(batch.slice(number, 1)) for number in range(batch.num_rows)]


def _row(batch: pa.RecordBatch) -> object:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Unreadable("invalid_utf8", f"byte {error.start} of a text is 0x{error.object[error.start]:02x}")


def _groups_before(path: Path, row: int) -> tuple[int, int]:
    """How many whole row groups lie before a row, and their rows."""
    groups = rows = 0
    for size in parquet_groups(path):
        if rows + size > row:
            break
        groups, rows = groups + 1, rows + size
    return groups, rows


def _parquet_batches(path: Path, columns: Sequence[str], row: int) -> Iterator[pa.RecordBatch]:
    # Without pre_buffer, and with a read buffer, a row group is decoded as it is read and never held as a whole.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BUFFER) as file:
        groups = range(_groups_before(path, row)[0], file.num_row_groups)
        known = [name for name in file.schema_arrow.names if name in columns]
        yield from file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=known, use_threads=False)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    # Read, not mapped: pages of a mapping count as memory of this process for as long as the system keeps them.
    with pa.OSFile(str(path)) as source:
        if source.read(6) == b"ARROW1":
            with pa.ipc.open_file(source) as file:
                for number in range(file.num_record_batches):
                    yield file.get_batch(number)
            return
        source.seek(0)
        with pa.ipc.open_stream(source) as stream:
            yield from stream
