"""Clean rows in bulk: a block of JSON to finished lines with two calls of ``msgspec``, which knows their fields.

It makes objects of the fields that are kept and of nothing else, and of no row a ``dict``. A row goes this way only
if it is certain to be accepted, and comes out as the same bytes as by :mod:`utils.data.formats`; a row in doubt, and
a block with anything odd in it, is left to that, so that every rule has one implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import msgspec

from utils.data.formats import FORMATS, Format

OPEN, CLOSE = b"{}"
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
_ENCODE_LINES = msgspec.json.Encoder().encode_lines

Careful = Callable[[int], bytes]


class Turn(msgspec.Struct, gc=False):
    """A turn of a conversation, as it comes."""

    sender: str = msgspec.field(name="from")
    value: str


class Conversation(msgspec.Struct, gc=False):
    """A row of turns, as it comes."""

    conversations: list[Turn]


class Message(msgspec.Struct, gc=False):
    """A turn, as it goes."""

    role: str
    content: str


class Line(msgspec.Struct, gc=False):
    """A row, as it goes."""

    dataset: str
    id: str
    messages: list[Message]


Messages = Callable[[msgspec.Struct], list[Message] | None]
"""Messages of a row, None where it is in doubt whether it is accepted as it is."""


class FastLane:
    """Reads and converts rows of one data set."""

    def __init__(self, known: Format) -> None:
        row, self._messages = _conversations(known) if known.senders else _pairs(known)
        self._label = known.label
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
        label, messages_of = self._label, self._messages
        made: list[Line | msgspec.Raw] = []
        for number, row in enumerate(rows, first):
            messages = messages_of(row)
            if messages is not None:
                made.append(Line(label, f"{label}_{number}", messages))
            elif line := careful(number):
                made.append(msgspec.Raw(line[:-1]))
        return _ENCODE_LINES(made)


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


def _conversations(known: Format) -> tuple[type, Messages]:
    """Rows of turns: all of them by known senders and not blank, one by the assistant."""
    senders = known.senders
    answering = {sender for sender, role in senders.items() if role == "assistant"}

    def messages(row: Conversation) -> list[Message] | None:
        turns, made = row.conversations, []
        try:
            for turn in turns:
                text = turn.value
                if not text or text.isspace():
                    return None
                made.append(Message(senders[turn.sender], text))
        except KeyError:
            return None
        if turns and turn.sender in answering or any(turn.sender in answering for turn in turns):
            return made
        return None

    return Conversation, messages


def _pairs(known: Format) -> tuple[type, Messages]:
    """Rows of a question and an answer, neither of them blank, and of what may be given between the two."""
    question, *given, answer = known.columns
    fields = [("question", str), ("answer", str), *(("given", str | None, None) for _ in given)]
    names = dict(zip(("question", "answer", "given"), (question, answer, *given), strict=False))
    row_type = msgspec.defstruct("Pair", fields, rename=names, gc=False)

    def messages(row: msgspec.Struct) -> list[Message] | None:
        user, assistant = row.question, row.answer
        if given and row.given:
            user = f"{user}\nInput: {row.given}\n"
        if not user or user.isspace() or not assistant or assistant.isspace():
            return None
        return [Message("user", user), Message("assistant", assistant)]

    return row_type, messages
