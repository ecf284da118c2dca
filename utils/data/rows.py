"""Rows of reformatted and mixed files: ``messages``, or ``prompt`` and ``completion``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson

from router_tuning.data.containers import BOM, reading
from router_tuning.data.json_rows import SPACE
from router_tuning.errors import UserError

ROLES = ("system", "user", "assistant")
AGAIN = "docs/data.md says how a row is written; entrypoints/data/reformat_datasets.py writes such rows"


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and text, without byte order mark and end, of lines that are not blank; UserError as ``reading`` has."""
    with reading(path), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip(SPACE):
                yield number, line.removeprefix(BOM).rstrip(b"\r\n")


def checked_row(line: bytes, where: str) -> dict:
    """The row that a line holds; raises :class:`UserError`, beginning with ``where``, if it is none."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: no JSON ({error}); {AGAIN}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: no JSON object; {AGAIN}")
    if "messages" in row:
        _check_messages(row["messages"], where)
    elif not (isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)):
        raise UserError(f"{where}: neither a list of 'messages' nor the texts 'prompt' and 'completion'; {AGAIN}")
    return row


def content_of(row: dict) -> object:
    """What makes two rows the same."""
    return row["messages"] if "messages" in row else [row["prompt"], row["completion"]]


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' is no list of turns; {AGAIN}")
    for number, message in enumerate(messages):
        if not (isinstance(message, dict) and isinstance(message.get("content"), str)):
            raise UserError(f"{where}: message {number} has no text; {AGAIN}")
        if message.get("role") not in ROLES:
            raise UserError(f"{where}: message {number} has the role {message.get('role')!r}; use {', '.join(ROLES)}")
