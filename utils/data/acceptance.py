"""Which conversations are accepted: the one place that says so.

A conversation is kept exactly as its source has it, turn by turn, if every turn has a known sender and text.
What is done with the irregular ones:

| conversation | done | published converter |
|---|---|---|
| starts with the assistant | kept | kept |
| repeats a role (two user turns in a row, …) | kept, turns are not merged | kept |
| has a system turn in the middle | kept where it stands | kept |
| has a blank system turn | that turn is left out, the row is kept | turn kept |
| has a blank user or assistant turn (nothing but white space) | filtered, ``empty_turn`` | kept |
| has no assistant turn, so nothing to learn | filtered, ``no_assistant`` | kept |
| has no turn at all | filtered, ``empty_conversation`` | dropped without a word |
| has a turn of Bing (vicuna_sharegpt, evol_instruct) | filtered, ``bing_sender`` | dropped, counted |
| has a system turn (evol_instruct only) | filtered, ``system_turn`` | dropped, counted |
| has an unknown sender | refused, ``unknown_sender`` | the whole data set ends there |
| lacks a field, or a field is not text | refused, ``missing_field``, ``wrong_type`` | ends there, or keeps a number |
| is no JSON object, or larger than 16 MiB | refused, ``not_json``, ``not_an_object``, ``row_too_large`` | ends there |
| has text that is not Unicode | refused, ``invalid_utf8``, ``lone_surrogate`` | ends there, or kept |

*Filtered* rows are sound but of no use for training; *refused* rows are faults of the file and count for
``--max_reject_rate``. Both are listed in ``rejects.jsonl`` with reason, file and line; ``--strict`` allows neither.
A row keeps the number that it has in its source as its id, whatever is left out before it.
"""

from __future__ import annotations

Message = dict[str, str]

MAX_ROW_BYTES = 16 << 20
"""A row must fit into memory with all that is made of it."""

_TYPES = {bool: "a boolean", str: "a string", dict: "an object", list: "an array", int: "a number", float: "a number"}

FILTERED = frozenset({"bing_sender", "system_turn", "empty_conversation", "empty_turn", "no_assistant"})
"""Reasons to leave out a row that is sound; every other reason is a fault."""


class Reject(Exception):
    """A row that is left out: ``reason`` is one of the codes of the table above, ``detail`` says where in the row.

    ``text``: the beginning of a row of which nothing but its text is known.
    """

    def __init__(self, reason: str, detail: str, text: str = "") -> None:
        super().__init__(reason, detail, text)
        self.reason, self.detail, self.text = reason, detail, text


def checked(messages: list[Message]) -> list[Message]:
    """The messages to keep, each with text; raises :class:`Reject` for what the table above leaves out.

    The roles must already be known ones. The list is returned as it is wherever no system turn is blank.
    """
    learnt = blank_system = False
    for message in messages:
        content = message["content"]
        if content.__class__ is not str:
            raise Reject("wrong_type", f"turn {messages.index(message)}: the text is {json_type(content)}")
        if not content or content.isspace():
            if message["role"] != "system":
                raise Reject("empty_turn", f"turn {messages.index(message)} ({message['role']}) is blank")
            blank_system = True
        elif message["role"] == "assistant":
            learnt = True
    if learnt:
        return [turn for turn in messages if turn["content"].strip()] if blank_system else messages
    if messages:
        raise Reject("no_assistant", "no assistant turn: nothing to learn")
    raise Reject("empty_conversation", "no turn")


def json_type(value: object) -> str:
    """What JSON calls the type of a parsed value, for messages."""
    if value is None or value != value:
        return "null" if value is None else "NaN"
    return _TYPES.get(type(value), "no JSON value")
