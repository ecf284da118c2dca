"""Rows of Parquet and Arrow files, as JSON would have them: objects of those columns that are asked for."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from router_tuning.data.acceptance import Reject
from router_tuning.data.json_rows import Rows
from router_tuning.errors import UserError

BATCH_ROWS = 256
READ_BUFFER = 1 << 20


def table_rows(path: Path, parquet: bool, columns: Sequence[str]) -> Rows:
    """Rows of a table with their numbers, from 1; columns that it lacks are missing in them.

    Raises :class:`UserError` if two of the columns have one name.
    """
    batches = _parquet_batches(path, columns) if parquet else _arrow_batches(path, columns)
    yield from enumerate((row for batch in batches for row in _values(batch)), 1)


def _parquet_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    # Without pre_buffer, and with a read buffer, a row group is decoded as it is read and never held as a whole.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BUFFER) as file:
        known = [file.schema_arrow.names[index] for index in _indices(path, file.schema_arrow, columns)]
        yield from file.iter_batches(BATCH_ROWS, columns=known, use_threads=False)


def _arrow_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    source = pa.py_buffer(mapped)
    is_file = mapped[:6] == b"ARROW1"
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    indices = _indices(path, reader.schema, columns)
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
        for first in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.select(indices).slice(first, BATCH_ROWS)
            # Many writers make one batch of a whole file: what is read of it need not stay in memory.
            mapped.madvise(mmap.MADV_DONTNEED)


def _indices(path: Path, schema: pa.Schema, columns: Sequence[str]) -> list[int]:
    """Where the columns are that a table has of ``columns``; UserError where a name means two of them."""
    indices = [index for index, name in enumerate(schema.names) if name in columns]
    names = [schema.names[index] for index in indices]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: {repeated[0]!r} is the name of two columns; rename or drop one of them")
    return indices


def _values(batch: pa.RecordBatch) -> list[object]:
    if not batch.num_columns:
        return [{} for _ in range(batch.num_rows)]
    try:
        batch.validate(full=True)  # where a file is damaged, offsets lead anywhere
        return batch.to_pylist(maps_as_pydicts="lossy")
    except ValueError as error:  # of one row or another
        if batch.num_rows > 1:
            return [row for number in range(batch.num_rows) for row in _values(batch.slice(number, 1))]
        if "UTF8" in str(error):
            return [Reject("invalid_utf8", "a text is no UTF-8")]
        if isinstance(error, pa.ArrowInvalid):
            raise
        return [Reject("wrong_type", " ".join(str(error).split())[:300])]
