"""Which conversations are accepted: the one place that decides. What is left out, and why, is listed in docs/data.md.

*Filtered* rows are sound but of no use for training; *refused* rows are faults of the file and count for
``--max_reject_rate``. A conversation that is accepted is kept exactly as its source has it, turn by turn.
"""

from __future__ import annotations

Message = dict[str, str]
Content = dict[str, object]
"""``{"messages": […]}``, or of plain text ``{"prompt": "", "completion": text}``: every token of it carries loss."""

MAX_ROW_BYTES = 16 << 20
"""A row must fit into memory with all that is made of it."""

_TYPES = {bool: "a boolean", str: "a string", dict: "an object", list: "an array", int: "a number", float: "a number"}

FILTERED = frozenset({"bing_sender", "system_turn", "empty_conversation", "empty_turn", "no_assistant"})
"""Reasons to leave out a row that is sound; every other reason is a fault."""


class Reject(Exception):
    """A row that is left out: ``reason`` is a code that docs/data.md lists, ``detail`` says where in the row.

    ``text``: the beginning of a row of which nothing but its text is known.
    """

    def __init__(self, reason: str, detail: str, text: str = "") -> None:
        super().__init__(reason, detail, text)
        self.reason, self.detail, self.text = reason, detail, text


def conversation(messages: list[Message]) -> Content:
    """The content of a row with these turns, whose roles are known ones; :class:`Reject` for what is left out.

    A blank system turn is left out, and the row kept.
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
        return {"messages": [turn for turn in messages if turn["content"].strip()] if blank_system else messages}
    if messages:
        raise Reject("no_assistant", "no assistant turn: nothing to learn")
    raise Reject("empty_conversation", "no turn")


def json_type(value: object) -> str:
    """What JSON calls the type of a parsed value, for messages."""
    if value is None or value != value:
        return "null" if value is None else "NaN"
    return _TYPES.get(type(value), "no JSON value")
