"""Clean rows in bulk: from JSON text to finished lines, without parsing and writing their texts.

A decoder that knows the fields of a data set reads a block of rows and leaves every text as the slice of JSON that it
is in the source. Where that slice is what ``orjson`` would write, as nearly all are, it is copied. A row goes this
way only if it is certain to be accepted, and comes out as the same bytes as by :mod:`utils.data.formats`; rows in
doubt, and blocks with anything odd in them, are left to it, so that every rule has one implementation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache

import msgspec
import numpy as np
import orjson
from msgspec import Raw

from utils.data.formats import FORMATS, Format

QUOTE, BACKSLASH, OPEN, CLOSE = b'"\\{}'
UNICODE, SOLIDUS = (int.from_bytes(escape, "little") for escape in (b"\\u", b"\\/"))
SIZES = {ord("u"): 6, ord("/"): 2}
"""Of the escapes that orjson does not write as they are, by their second byte."""

NOTHING = Raw(b'""')
SURE = tuple(byte > 0x20 and byte not in b'"\\\xc2\xe1\xe2\xe3' for byte in range(256))
"""First bytes of a text in its quotes that alone show that it is not blank: not those that Unicode's spaces begin
with."""

DENSE = 400
"""Bytes of output per escape below which texts are written anew as a whole."""

_BEGUN = re.compile(rb'"(?:\\[nrt]| )*(?:[!#-\[\]-~]|\\["\\/])')
"""JSON of a text that begins with the usual white space, and goes on."""

_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)

Careful = Callable[[int], bytes]
Convert = Callable[[list, int, Careful, bool], list[bytes]]


class Turn(msgspec.Struct, gc=False):
    """A turn of a conversation; its text in JSON."""

    sender: str = msgspec.field(name="from")
    value: Raw


class Conversation(msgspec.Struct, gc=False):
    """A row of turns."""

    conversations: list[Turn]


class FastLane:
    """Reads and converts rows of one data set."""

    def __init__(self, known: Format) -> None:
        row, self._convert = _conversations(known) if known.senders else _pairs(known)
        self._lines = msgspec.json.Decoder(row).decode_lines
        self._array = msgspec.json.Decoder(list[row]).decode

    def lines(self, text: bytes) -> list | None:
        """Rows of whole lines, each with its end; None unless every line is one row."""
        try:
            rows = self._lines(_utf8(text))
        except _UNREADABLE:
            return None
        return rows if _one_a_line(text, len(rows)) else None

    def array(self, text: bytes) -> list | None:
        """Rows of an array; None if there is anything else in it."""
        try:
            return self._array(_utf8(text))
        except _UNREADABLE:
            return None

    def convert(self, rows: list, first: int, careful: Careful) -> bytes:
        """Lines of the accepted ones of ``rows``, the first of which has the number ``first``.

        ``careful`` makes the line of a row in doubt, by its number: empty if it is left out.
        """
        made = _canonical(b"".join(self._convert(rows, first, careful, False)))
        return b"".join(self._convert(rows, first, careful, True)) if made is None else made


@cache
def lane_of(name: str) -> FastLane:
    """The lane of a data set."""
    return FastLane(FORMATS[name])


def _utf8(text: bytes) -> bytes:
    """The text; UnicodeDecodeError unless it is UTF-8, which the decoder does not look at in what it passes over."""
    if not text.isascii():
        text.decode("utf-8")
    return text


def _one_a_line(text: bytes, count: int) -> bool:
    """Whether ``count`` JSON objects, which are known to be all of ``text``, are one on each line.

    They are if there are as many lines, each from ``{`` to ``}``: no line then ends inside of an object, because
    ``}`` is never followed by ``{`` there.
    """
    begin = 0
    for _ in range(count):
        end = text.find(b"\n", begin)
        if end < 0 or text[begin] != OPEN or (text[end - 1] != CLOSE and text[end - 2 : end] != b"}\r"):
            return False
        begin = end + 1
    return begin == len(text)


def _sure(text: bytes) -> bool:
    """Whether JSON of any kind is a text that is not blank; orjson.JSONDecodeError for half of a surrogate pair."""
    if text[0] != QUOTE:
        return False
    if SURE[text[1]] or _BEGUN.match(text):
        return True
    value = orjson.loads(text)
    return bool(value) and not value.isspace()


def _written(text: bytes) -> bytes:
    """As orjson writes it."""
    return orjson.dumps(orjson.loads(text))


class _Replaced(dict):
    """Escapes, as orjson writes what they stand for; orjson.JSONDecodeError for half of a surrogate pair."""

    def __missing__(self, escapes: bytes) -> bytes:
        written = _written(b'"%b"' % escapes)[1:-1]
        if len(self) < 1 << 14:
            self[escapes] = written
        return written


_REPLACED = _Replaced()


def _canonical(lines: bytes) -> bytes | None:
    """Lines with the escapes that orjson would not write as they are replaced; None if they are too many, or faulty.

    The decoder has made sure that escapes are well-formed; of those, orjson never writes ``\\/``, and ``\\u`` only
    for control characters.
    """
    found = sorted((*_doubtful(lines, 0), *_doubtful(lines, 1))) if lines else []
    if not found:
        return lines
    if len(found) * DENSE > len(lines):
        return None
    pieces, done = [], 0
    try:
        for begin in found:
            if begin < done or (lines[begin - 1] == BACKSLASH and _is_escaped(lines, begin)):
                continue
            end = begin
            while lines[end] == BACKSLASH and (size := SIZES.get(lines[end + 1])):
                end += size  # those that follow each other may be halves of a pair
            pieces += lines[done:begin], _REPLACED[lines[begin:end]]
            done = end
    except orjson.JSONDecodeError:
        return None
    pieces.append(lines[done:])
    return b"".join(pieces)


def _doubtful(lines: bytes, offset: int) -> Iterator[int]:
    """Where ``\\u`` and ``\\/`` are, at even places from ``offset``: compared as numbers of 16 bits."""
    pairs = np.frombuffer(lines, "<u2", (len(lines) - offset) // 2, offset)
    marks = pairs == UNICODE
    marks |= pairs == SOLIDUS
    found = marks.tobytes()
    at = found.find(1)
    while at >= 0:
        yield offset + 2 * at
        at = found.find(1, at + 1)


def _is_escaped(lines: bytes, at: int) -> bool:
    """Whether the backslash there is what another one stands for."""
    begin = at
    while lines[begin - 1] == BACKSLASH:
        begin -= 1
    return (at - begin) % 2 == 1


def _conversations(known: Format) -> tuple[type, Convert]:
    """Rows of turns."""
    opening = {sender: b'{"role":"%b","content":' % role.encode() for sender, role in known.senders.items()}
    following = {sender: b"}," + role for sender, role in opening.items()}
    answering = {sender for sender, role in known.senders.items() if role == "assistant"}
    head = b'{"dataset":"%b","id":"%b_%%d","messages":[' % ((known.label.encode(),) * 2)

    def convert(rows: list[Conversation], first: int, careful: Careful, anew: bool) -> list[bytes]:
        parts: list[bytes] = []
        add = parts.append
        for number, row in enumerate(rows, first):
            begin, roles, turns = len(parts), opening, row.conversations
            add(head % number)
            try:
                for turn in turns:
                    text = bytes(turn.value)
                    if not (text[0] == QUOTE and SURE[text[1]]) and not _sure(text):
                        raise ValueError
                    parts += roles[turn.sender], _written(text) if anew else text
                    roles = following
                if not (turns and turns[-1].sender in answering) and not any(t.sender in answering for t in turns):
                    raise ValueError
                add(b"}]}\n")
            except (KeyError, ValueError):
                del parts[begin:]
                add(careful(number))
        return parts

    return Conversation, convert


def _pairs(known: Format) -> tuple[type, Convert]:
    """Rows of a question and an answer, and of what may be given between the two."""
    fields = dict(zip(("question", *("given",)[: len(known.columns) - 2], "answer"), known.columns, strict=True))
    kinds = [("question", Raw), ("answer", Raw), ("given", Raw, NOTHING)]
    row_type = msgspec.defstruct("Pair", kinds, rename=fields, gc=False)
    head = b'{"dataset":"%b","id":"%b_%%d","messages":[{"role":"user","content":' % ((known.label.encode(),) * 2)

    def convert(rows: list, first: int, careful: Careful, anew: bool) -> list[bytes]:
        parts = []
        for number, row in enumerate(rows, first):
            question, answer, given = bytes(row.question), bytes(row.answer), bytes(row.given)
            try:
                if given != b'""' and given != b"null":
                    if question[0] != QUOTE or given[0] != QUOTE:
                        raise ValueError
                    question = b'%b\\nInput: %b\\n"' % (question[:-1], given[1:-1])
                elif not _sure(question):
                    raise ValueError
                if not _sure(answer):
                    raise ValueError
                if anew:
                    question, answer = _written(question), _written(answer)
                parts += (head % number, question, b'},{"role":"assistant","content":', answer, b"}]}\n")
            except ValueError:
                parts.append(careful(number))
        return parts

    return row_type, convert
