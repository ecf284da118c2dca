"""One JSON array of rows.

The array is cut into blocks at the byte pattern that separates its rows, and each block is parsed as a whole by the
fast parser. A cut is no guess: if ``[`` + block + ``]`` is valid JSON, then the block is a run of whole elements,
because any JSON parser that comes this way is back in the same state at its end. Where no cut holds, the elements
are taken one by one with the standard library's decoder, which also tells where a broken file breaks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import BinaryIO

import orjson

from router_tuning.data.blocks import (
    BLOCK_BYTES,
    BOM,
    MAX_ROW_BYTES,
    SPACE,
    Block,
    Place,
    Typed,
    Unreadable,
    newlines,
    whole_number,
)
from router_tuning.errors import UserError

CUTS = 4
"""Cuts tried from the end of a block before its elements are taken one by one."""

_GAP = re.compile(r"[ \t\r\n]*")
_SEPARATOR = re.compile(r'\}[ \t\r\n]*,[ \t\r\n]*\{[ \t\r\n]*"[^"\\]*"[ \t\r\n]*:')
_DECODER = json.JSONDecoder(parse_int=whole_number)


def separator_of(head: bytes) -> bytes:
    """The bytes between the first two rows of an array that starts with ``head``, from ``}`` to the first key's colon.

    They cannot occur inside a string, which would have to escape the quotes. Empty where there is no second row of
    that shape in ``head``.
    """
    text = head.removeprefix(BOM).decode("utf-8", "surrogateescape").lstrip(" \t\r\n")[1:]
    try:
        _, _, end = next(_elements(text))
    except ValueError:
        return b""
    found = _SEPARATOR.match(text, text.rfind("}", 0, end))
    return found.group().encode("utf-8", "surrogateescape") if found else b""


class ArrayReader:
    """Blocks of a stream that holds one array, from ``start``: its beginning, behind a comma, or behind its end.

    Unless at the beginning, the stream stands at the byte before ``start``, which tells the last two apart.
    ``separator`` is that of :func:`separator_of`. A stream that is not the ``last`` part of the array ends behind a
    comma. :meth:`blocks` raises :class:`UserError` with ``name`` and line where the array is broken, truncated or
    followed by something else.
    """

    def __init__(
        self,
        stream: BinaryIO,
        start: Place,
        name: str,
        separator: bytes = b"",
        last: bool = True,
        typed: Typed | None = None,
    ) -> None:
        self._stream, self._name, self._place = stream, name, start
        self._separator, self._last, self._typed = separator, last, typed
        self._data = b""
        self._exhausted = self._closed = False

    def blocks(self) -> Iterator[Block]:
        """All rows from here on."""
        if self._place.offset == 0:
            self._open()
        else:
            self._closed = self._stream.read(1) == b"]"
        while not self._closed:
            self._fill(BLOCK_BYTES)
            if self._exhausted and not self._last and not self._data.strip(SPACE):
                return
            block = self._bulk() or self._singly()
            yield block
        self._check_end()

    def _open(self) -> None:
        self._fill(BLOCK_BYTES)
        body = self._data.removeprefix(BOM).lstrip(SPACE)
        if not body.startswith(b"["):
            raise UserError(f"{self._name} is no JSON array")
        self._advance(len(self._data) - len(body) + 1)
        self._fill(BLOCK_BYTES)
        if self._data.lstrip(SPACE).startswith(b"]"):
            self._close(self._data.index(b"]"))

    def _fill(self, size: int) -> None:
        while len(self._data) < size and not self._exhausted:
            chunk = self._stream.read(size - len(self._data))
            self._data += chunk
            self._exhausted = not chunk

    def _advance(self, count: int) -> None:
        self._place = Place(self._place.offset + count, self._place.line + newlines(memoryview(self._data)[:count]))
        self._data = self._data[count:]

    def _close(self, bracket: int) -> None:
        self._advance(bracket + 1)
        self._closed = True

    def _cuts(self) -> Iterator[int]:
        """Where the data may be cut: behind the last rows of it, the latest cut first."""
        if self._exhausted:
            body = self._data.rstrip(SPACE)
            if body.endswith(b"]" if self._last else b","):
                yield len(body) - 1
        end = len(self._data)
        for _ in range(CUTS if self._separator else 0):
            end = self._data.rfind(self._separator, 0, end)
            if end < 0:
                return
            end += 1
            yield end

    def _bulk(self) -> Block | None:
        for cut in self._cuts():
            body = b"".join((b"[", memoryview(self._data)[:cut], b"]"))
            typed = self._typed.array(body) if self._typed else None
            if typed:
                parse = partial(_values, body)
            else:
                try:
                    rows = orjson.loads(body)
                except orjson.JSONDecodeError:
                    continue
                if not rows:
                    return None
                parse = partial(list, rows)
            line_of = _lines(body, self._place.line)
            delimiter = self._data[cut:].lstrip(SPACE)[:1]
            if delimiter == b"]":
                self._close(self._data.index(delimiter, cut))
            else:
                self._advance(self._data.index(delimiter, cut) + 1)
            return Block(parse, self._place, line_of, typed)
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
        self._advance(len(text[:used].encode("utf-8", "surrogateescape")))
        self._closed = text[used - 1] == "]"
        return Block(lambda: rows, self._place, numbers.__getitem__)

    def _broken(self, fault: str) -> UserError:
        where = f"{self._name}:{self._place.line + 1}"
        if self._exhausted:
            return UserError(f"{where}: the array is broken, or breaks off, in the row that starts here: {fault}")
        return UserError(
            f"{where}: the row that starts here is broken, or larger than {MAX_ROW_BYTES >> 20} MiB: {fault}"
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
    """Value, begin and end (behind its comma or bracket) of the elements that ``text`` starts with.

    Raises ValueError at an element that is broken or not all there.
    """
    end = 0
    while not end or text[end - 1] != "]":
        begin = _GAP.match(text, end).end()
        try:
            value, end = _DECODER.raw_decode(text, begin)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        raw, end = text[begin:end], _GAP.match(text, end).end() + 1
        delimiter = text[end - 1 : end]
        if delimiter not in (",", "]"):
            raise ValueError(f"{delimiter!r} where a comma or the array's end should be" if delimiter else "no end")
        yield _checked_bytes(raw, value), begin, end


def _checked_bytes(raw: str, value: object) -> object:
    """The value, unless bytes that are no UTF-8 are in its text, where decoding left them as lone surrogates."""
    try:
        raw.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(raw[error.start]) & 0xFF
        return Unreadable.of("invalid_utf8", f"character {error.start} of the row is the byte 0x{byte:02x}", raw)
    return value


def _values(body: bytes) -> list[object]:
    """The elements of an array that has been read before."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:  # it is stricter, as with numbers beyond its range
        return [value for value, _, _ in _elements(body.decode("utf-8")[1:])]


def _lines(body: bytes, before: int) -> Callable[[int], int]:
    """The line of each row of a parsed block in its brackets, looked for only when somebody asks."""

    @cache
    def numbers() -> list[int]:
        text = body.decode("utf-8")[1:]
        return [before + 1 + text.count("\n", 0, begin) for _, begin, _ in _elements(text)]

    return lambda row: numbers()[row]
