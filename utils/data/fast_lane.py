"""Clean rows in bulk: ``msgspec`` finds the texts in a block of JSON, and they are copied into finished lines.

They are copied as they stand there, with the escapes that :mod:`escapes` has mended. A row goes this way
only if it is certain to be accepted, and comes out as the same bytes as by the rules of :mod:`formats`. A
row in doubt, and a block with anything odd in it, is left to those: every rule has one implementation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache

import msgspec
import orjson

from router_tuning.data.escapes import canonical
from router_tuning.data.formats import FORMATS, Format

OPEN, CLOSE, QUOTE = b'{}"'
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
_begin = struct.Struct("<H").unpack_from
_INKED = frozenset(_begin(b'"%c' % letter) for letter in range(0x21, 0x7F) if letter not in b'"\\')
"""How most strings begin that are not blank: with a letter which shows, and no escape."""

Careful = Callable[[int], bytes]
Add = Callable[[bytes | memoryview | msgspec.Raw], None]


class Turn(msgspec.Struct, gc=False):
    """A turn of a conversation."""

    sender: str = msgspec.field(name="from")
    value: msgspec.Raw


class Conversation(msgspec.Struct, gc=False):
    """A row of turns."""

    conversations: list[Turn]


Writer = Callable[[msgspec.Struct, Add], bool]
"""Hands on the messages of a row, piece by piece; False, perhaps after some of them, where it is in doubt whether the
row is accepted as it is."""


class FastLane:
    """Reads and converts rows of one data set."""

    def __init__(self, known: Format) -> None:
        row, self._write = _conversations(known) if known.senders else _pairs(known)
        self._head = f'{{"dataset":"{known.label}","id":"{known.label}_'.encode()
        self._lines = msgspec.json.Decoder(row).decode_lines
        self._array = msgspec.json.Decoder(list[row]).decode

    def lines(self, text: bytes) -> list | None:
        """Rows of whole lines, each with its end; None unless every line is one row."""
        rows = _read(self._lines, text)
        return rows if rows is not None and _one_a_line(text, len(rows)) else None

    def array(self, text: bytes) -> list | None:
        """Rows of an array; None if there is anything else in it."""
        return _read(self._array, text)

    def convert(self, rows: list, first: int, careful: Careful) -> bytes:
        """Lines of the accepted ones of ``rows``, the first of which has the number ``first``.

        ``careful`` makes the line of a row in doubt, by its number: empty if it is left out.
        """
        write, head, made = self._write, self._head, []
        add = made.append
        for number, row in enumerate(rows, first):
            begin = len(made)
            add(b'%b%d","messages":[' % (head, number))
            try:
                accepted = write(row, add)
            except struct.error:  # a number of one digit
                accepted = False
            if accepted:
                add(b"}]}\n")
            else:
                made[begin:] = (careful(number),)
        return b"".join(made)


@cache
def lane_of(name: str) -> FastLane:
    """The lane of a data set."""
    return FastLane(FORMATS[name])


def _read(decode: Callable[[bytes], list], text: bytes) -> list | None:
    try:
        if not text.isascii():
            text.decode("utf-8")  # the decoder does not look at what it passes over
        plain = canonical(text)
        return None if plain is None else decode(plain)
    except _UNREADABLE:
        return None


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


def _is_text(value: msgspec.Raw) -> bool:
    """Whether JSON is a string that is not blank."""
    if memoryview(value)[0] != QUOTE:
        return False
    text = orjson.loads(bytes(value))
    return bool(text) and not text.isspace()


def _opening(role: str) -> bytes:
    return b'{"role":"%b","content":' % role.encode()


def _conversations(known: Format) -> tuple[type, Writer]:
    """Rows of turns: all of them by known senders and not blank, one by the assistant."""
    answering = {sender for sender, role in known.senders.items() if role == "assistant"}
    leading = {sender: _opening(role) for sender, role in known.senders.items()}
    following = {sender: b"}," + opening for sender, opening in leading.items()}

    def write(row: Conversation, add: Add) -> bool:
        openings, sender = leading, None
        for turn in row.conversations:
            sender, text = turn.sender, turn.value
            if sender not in openings or (_begin(text) not in _INKED and not _is_text(text)):
                return False
            add(openings[sender])
            add(text)
            openings = following
        return sender in answering or any(turn.sender in answering for turn in row.conversations)

    return Conversation, write


def _pairs(known: Format) -> tuple[type, Writer]:
    """Rows of a question and an answer, neither of them blank, and of what may be given between the two."""
    question, *given, answer = known.columns
    raw = msgspec.Raw
    fields = [("question", raw), ("answer", raw), *(("given", raw, raw(b"null")) for _ in given)]
    names = dict(zip(("question", "answer", "given"), (question, answer, *given), strict=False))
    row_type = msgspec.defstruct("Pair", fields, rename=names, gc=False)
    user, assistant = _opening("user"), b"}," + _opening("assistant")

    def write(row: msgspec.Struct, add: Add) -> bool:
        asked, said = row.question, row.answer
        if not all(_begin(text) in _INKED or _is_text(text) for text in (asked, said)):
            return False
        add(user)
        if given and (more := bytes(row.given)) not in (b"null", b'""'):
            if more[0] != QUOTE:
                return False
            for part in (memoryview(asked)[:-1], b"\\nInput: ", more[1:-1], b'\\n"'):
                add(part)
        else:
            add(asked)
        add(assistant)
        add(said)
        return True

    return row_type, write
