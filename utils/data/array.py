"""One JSON array of rows.

The array is cut into blocks at the byte pattern that separates its rows, and each block is parsed as a whole by the
fast parser. A cut is no guess: if ``[`` + block + ``]`` is valid JSON, then the block is a run of whole elements,
because any JSON parser that comes this way is back in the same state at its end. Where no cut holds, the elements
are taken one by one with the standard library's decoder, which also tells where a broken file breaks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import BinaryIO

import orjson

from utils.data.blocks import BLOCK_BYTES, BOM, MAX_ROW_BYTES, Block, Place, Unreadable
from utils.errors import UserError

SPACE = b" \t\r\n"
CUTS = 4
"""Cuts tried from the end of a block before its elements are taken one by one."""

_GAP = re.compile(r"[ \t\r\n]*")
_SEPARATOR = re.compile(r'\}[ \t\r\n]*,[ \t\r\n]*\{[ \t\r\n]*"[^"\\]*"[ \t\r\n]*:')
_DECODER = json.JSONDecoder()


class ArrayReader:
    """Blocks of a stream that holds one array and stands at ``start``: at its beginning, or behind a comma.

    :meth:`blocks` raises :class:`UserError` with ``name`` and line where the array is broken, truncated or followed
    by something else.
    """

    def __init__(self, stream: BinaryIO, start: Place, name: str) -> None:
        self._stream, self._name, self._place = stream, name, start
        self._data, self._separator = b"", b""
        self._exhausted = self._closed = False

    def blocks(self) -> Iterator[Block]:
        """All rows from here on."""
        if self._place.offset == 0:
            self._open()
        while not self._closed:
            self._fill(BLOCK_BYTES)
            block = self._bulk() or self._singly()
            if block.rows:
                yield block
        self._check_end()

    def _open(self) -> None:
        self._fill(BLOCK_BYTES)
        body = self._data.removeprefix(BOM).lstrip(SPACE)
        if not body.startswith(b"["):
            raise UserError(f"{self._name} is no JSON array")
        self._advance(len(self._data) - len(body) + 1)
        if self._data.lstrip(SPACE).startswith(b"]"):
            self._close(self._data.index(b"]"))

    def _fill(self, size: int) -> None:
        while len(self._data) < size and not self._exhausted:
            chunk = self._stream.read(size - len(self._data))
            self._data += chunk
            self._exhausted = not chunk

    def _advance(self, count: int) -> None:
        passed, self._data = self._data[:count], self._data[count:]
        self._place = Place(self._place.offset + count, self._place.line + passed.count(b"\n"))

    def _close(self, bracket: int) -> None:
        self._advance(bracket + 1)
        self._closed = True

    def _cuts(self) -> Iterator[int]:
        """Where the data may be cut: behind the last rows of it, the latest cut first."""
        if self._exhausted:
            body = self._data.rstrip(SPACE)
            if body.endswith(b"]"):
                yield len(body) - 1
        end = len(self._data)
        for _ in range(CUTS if self._separator else 0):
            end = self._data.rfind(self._separator, 0, end)
            if end < 0:
                return
            yield end + 1

    def _bulk(self) -> Block | None:
        for cut in self._cuts():
            body = self._data[:cut]
            try:
                rows = orjson.loads(b"[" + body + b"]")
            except orjson.JSONDecodeError:
                continue
            line_of = _lines(body, self._place.line)
            if self._data[cut:].lstrip(SPACE).startswith(b"]"):
                self._close(self._data.index(b"]", cut))
            else:
                self._advance(self._data.index(b",", cut) + 1)
            return Block(rows, self._place, line_of)
        return None

    def _singly(self) -> Block:
        """The whole elements at the front of the data, at least one."""
        while True:
            text = self._data.decode("utf-8", "surrogateescape")
            rows, begins, used, fault = [], [], 0, ""
            try:
                for value, begin, end in _elements(text):
                    rows.append(value)
                    begins.append(begin)
                    used = end
            except ValueError as error:
                fault = str(error)
            if rows:
                break
            if self._exhausted or len(self._data) > MAX_ROW_BYTES:
                raise self._broken(fault)
            self._fill(2 * len(self._data))
        line = self._place.line + 1
        numbers = [line + text.count("\n", 0, begin) for begin in begins]
        self._learn_separator(text, begins)
        self._advance(len(text[:used].encode("utf-8", "surrogateescape")))
        self._closed = text[used - 1] == "]"
        return Block(rows, self._place, numbers.__getitem__)

    def _learn_separator(self, text: str, begins: list[int]) -> None:
        if len(begins) > 1:
            found = _SEPARATOR.search(text, text.rindex("}", 0, begins[1]) if "}" in text[: begins[1]] else 0)
            if found and found.end() > begins[1]:
                self._separator = found.group().encode("utf-8", "surrogateescape")

    def _broken(self, fault: str) -> UserError:
        line = self._place.line + 1
        if self._exhausted:
            return UserError(
                f"{self._name}:{line}: the array breaks off or is broken in the row that starts here: {fault}"
            )
        limit = MAX_ROW_BYTES >> 20
        return UserError(
            f"{self._name}:{line}: the row that starts here is broken or larger than {limit} MiB: {fault}"
        )

    def _check_end(self) -> None:
        while True:
            if self._data.strip(SPACE):
                raise UserError(f"{self._name}:{self._place.line + 1}: there is something behind the end of the array")
            self._advance(len(self._data))
            if self._exhausted:
                return
            self._fill(BLOCK_BYTES)


def _elements(text: str) -> Iterator[tuple[object, int, int]]:
    """Value, begin and end (behind its comma or bracket) of the elements that text starts with.

    Raises ValueError at an element that is broken or not all there.
    """
    position = 0
    while True:
        begin = _GAP.match(text, position).end()
        try:
            value, end = _DECODER.raw_decode(text, begin)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        position = _GAP.match(text, end).end() + 1
        delimiter = text[position - 1 : position]
        if delimiter not in (",", "]"):
            raise ValueError(
                f"{delimiter!r} where a comma or the end of the array should be" if delimiter else "no end"
            )
        yield _without_bytes(text[begin:end], value), begin, position
        if delimiter == "]":
            return


def _without_bytes(raw: str, value: object) -> object:
    try:
        raw.encode("utf-8")
    except UnicodeEncodeError as error:
        return Unreadable(
            "invalid_utf8", f"character {error.start} of the row is byte 0x{ord(raw[error.start]) & 255:02x}"
        )
    return value


def _lines(body: bytes, before: int):
    """Line of a row of a parsed block, looked for only when somebody asks."""

    @cache
    def begins() -> list[int]:
        text = body.decode("utf-8")
        return [before + 1 + text.count("\n", 0, begin) for _, begin, _ in _elements(f"{text}]")]

    return lambda row: begins()[row]
