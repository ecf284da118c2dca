"""Bytes of a file, decompressed if need be, where every way to fail is one clear line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from router_tuning.errors import UserError

GZIP, ZSTD = "gzip", "zstd"
MAGIC = {b"\x1f\x8b": GZIP, b"\x28\xb5\x2f\xfd": ZSTD}
SKIP_BYTES = 1 << 20


def compression_of(path: Path) -> str | None:
    """How a file is compressed, by its first bytes."""
    with path.open("rb") as raw:
        head = raw.read(4)
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while ``path`` is read into a :class:`UserError` that names it."""
    try:
        yield
    except EOFError:
        raise UserError(f"{path} is truncated: the compressed data break off; fetch the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}; fetch the file again") from None
    except OSError as error:
        # pyarrow reports damaged data as OSError without an errno.
        if error.errno is None:
            raise UserError(f"{path} is truncated or damaged: {_one_line(error)}; fetch the file again") from None
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def open_bytes(path: Path, start: int = 0, stop: int | None = None) -> Iterator[BinaryIO]:
    """The decompressed bytes ``start`` to ``stop`` of a file. Errors come out as in :func:`reading`."""
    compression = compression_of(path)
    with path.open("rb") as raw:
        if compression is None:
            raw.seek(start)
            yield raw if stop is None else io.BufferedReader(_Window(raw, stop - start))
            return
        with _decompressed(raw, compression) as stream:
            while start > 0:
                skipped = len(stream.read(min(start, SKIP_BYTES)))
                if not skipped:
                    raise EOFError
                start -= skipped
            yield stream


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == GZIP:
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    # Loaded only where it is used: most inputs are plain files, and it takes a third of a second and 60 MB. Of the
    # readers at hand it is the one that tells a truncated stream from a finished one.
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


class _Window(io.RawIOBase):
    """The next ``size`` bytes of a file."""

    def __init__(self, raw: BinaryIO, size: int) -> None:
        self._raw, self._left = raw, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        count = self._raw.readinto(memoryview(buffer)[: self._left])
        self._left -= count
        return count
