"""Rows of JSON text: one a line, the elements of an array, or values one after the other, laid out as they like.

A row comes with the line on which it starts. In every layout its value is what :func:`parse` makes of its text, or the
:class:`Reject` that says why it has none.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

import orjson

from router_tuning.data.acceptance import MAX_ROW_BYTES, Reject
from router_tuning.errors import UserError

Rows = Iterator[tuple[int, object]]
"""Line, from 1, and value of each row."""

SPACE = b" \t\r\n"
"""White space of JSON; ``bytes.strip()`` alone would also take form feeds and the like."""

CHUNK = 1 << 18
EXCERPT = 1000
"""Characters of an unreadable row that are shown."""


def parse(raw: bytes) -> object:
    """The value of a row's text, or the :class:`Reject` that says why it has none.

    ``orjson`` reads strict JSON. The standard library reads what published files have beyond it: NaN, halves of
    surrogate pairs, numbers of any size.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        raw = raw.strip(SPACE)
        excerpt = raw[:EXCERPT].decode("utf-8", "backslashreplace")
    try:
        return _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Reject("invalid_utf8", f"byte {error.start} of the row is 0x{raw[error.start]:02x}", excerpt)
    except json.JSONDecodeError as error:
        return Reject(
            "not_json", f"{error.msg.removesuffix(' at')} at character {error.pos} of {len(error.doc)}", excerpt
        )
    except RecursionError:
        return Reject("not_json", "nested too deeply", excerpt)


def _integer(digits: str) -> int | float:
    """As ``orjson`` reads it: a float if it has more than 64 bits."""
    value = int(digits) if len(digits) <= 20 else 1 << 64
    return value if -(1 << 63) <= value < 1 << 64 else float(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)
_LENIENT = json.JSONDecoder(parse_int=_integer, strict=False)


def line_rows(stream: BinaryIO) -> Rows:
    """Rows of a stream of one JSON value a line, which ends with LF or CRLF; blank lines are no rows."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            size = len(line)
            while not line.endswith(b"\n") and (line := stream.readline(CHUNK)):
                size += len(line)
            yield number, Reject("row_too_large", f"{size:,} bytes, more than {MAX_ROW_BYTES >> 20} MiB")
        elif line.strip(SPACE):
            yield number, parse(line)


def element_rows(stream: BinaryIO, name: str, array: bool) -> Rows:
    """Elements of a stream that holds one array, or else values one after the other.

    Raises :class:`UserError`, with ``name`` and line, where they are broken, or followed by something else.
    """
    text = _Values(stream, name)
    if array:
        text.expect("[")
    delimiter = text.expect("]") if array and text.peek() == "]" else ","
    while delimiter != "]" and (text.peek() or array):
        yield text.line, text.value()
        delimiter = text.expect(",]") if array else ","
    if text.peek():
        raise UserError(f"{name}:{text.line}: there is something behind the end of the array")


_GAP = re.compile(r"[ \t\r\n]*")


class _Values:
    """JSON values in a stream, taken off its front one by one; ``line`` is that of the next character."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name, self.line = stream, name, 1
        self._text, self._at, self._undecoded = "", 0, b""
        self._ended = self._damaged = False  # whether it is all read, and whether any of it was no UTF-8

    def peek(self) -> str:
        """The next character that is no white space, where it then stands; empty at the end of the stream."""
        while True:
            self._advance(_GAP.match(self._text, self._at).end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, characters: str) -> str:
        """Take the next character, which must be one of these."""
        found = self.peek()
        if not found or found not in characters:
            wanted, there = " or ".join(map(repr, characters)), repr(found) if found else "the end of the file"
            raise UserError(f"{self._name}:{self.line}: the array is broken: {there} where {wanted} should be")
        self._at += 1
        return found

    def value(self) -> object:
        """Take the value that starts here."""
        while True:
            try:
                value, end = self._first()
                # A number, or a word, may go on in what is not read yet.
                if self._ended or self._text[end - 1] in '}]"' or self._text[end : end + 1] in tuple(", \t\r\n]"):
                    self._advance(end)
                    return value
                fault = "no end"
            except json.JSONDecodeError as error:
                fault = error.msg.removesuffix(" at")
            except RecursionError:
                fault = "nested too deeply"
            large = len(self._text) - self._at > MAX_ROW_BYTES
            if large or self._ended:
                fault += f", or more than {MAX_ROW_BYTES >> 20} MiB" if large else ", or the file breaks off"
                raise UserError(f"{self._name}:{self.line}: the row that starts here is broken: {fault}")
            self._more()

    def _first(self) -> tuple[object, int]:
        """The value that starts here, and where it ends; JSONDecodeError if it is not all there."""
        text, at = self._text, self._at
        try:
            value, end = _DECODER.raw_decode(text, at)
            if not self._damaged:
                return value, end
        except json.JSONDecodeError:
            end = _LENIENT.raw_decode(text, at)[1]  # a control character hides nothing of what is behind it
        return parse(text[at:end].encode("utf-8", "surrogateescape")), end

    def _more(self) -> bool:
        """Read on, at least as much again as there is; False at the end of the stream."""
        chunk = self._stream.read(max(CHUNK, len(self._text) - self._at))
        data = self._undecoded + chunk
        try:
            fresh, used = codecs.utf_8_decode(data, "strict", not chunk)
        except UnicodeDecodeError:
            self._damaged = True
            fresh, used = codecs.utf_8_decode(data, "surrogateescape", not chunk)
        self._text, self._at = self._text[self._at :] + fresh, 0
        self._undecoded, self._ended = data[used:], not chunk
        return bool(chunk or fresh)

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end
