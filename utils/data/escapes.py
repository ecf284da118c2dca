"""JSON text with its escapes as ``orjson`` writes them, so that its strings can be copied as they stand.

It escapes quotes, backslashes and control characters, and nothing else: ``\\u00e9`` and ``\\/`` are letters to it.
"""

from __future__ import annotations

import string
from functools import lru_cache

import numpy as np
import orjson

FEW, BYTES_EACH = 8, 512
"""Escapes that are mended in any text, and bytes for each further one: measured, where there are more of them it is
faster to parse the strings."""

_BACKSLASH, _U, _SLASH = b"\\u/"
_OUTSIDE = (string.ascii_letters + string.digits + string.whitespace + "+-.,:[]{}").encode()
"""What JSON has outside of strings, too."""


def canonical(text: bytes) -> bytes | None:
    """The same JSON with canonical escapes; None where it has many others, or has them where there is no string."""
    found = _escapes(text)
    count = np.count_nonzero(found)
    if not count:
        return text
    if count > FEW + len(text) // BYTES_EACH:
        return None
    flags = found.tobytes() + bytes(6)  # none starts behind the end
    begin = flags.find(1)
    view, parts, done = memoryview(text), [], 0
    while begin >= 0:
        if text[begin - 1] == _BACKSLASH and _is_escaped(text, begin):
            begin = flags.find(1, begin + 1)
            continue
        end = begin
        while flags[end]:
            end += 6 if text[end + 1] == _U else 2
        fixed = _fixed(text[begin:end])
        if fixed is None:
            return None
        parts += (view[done:begin], fixed)
        done, begin = end, flags.find(1, end)
    parts.append(view[done:])
    return b"".join(parts)


def _escapes(text: bytes) -> np.ndarray:
    """For each byte whether an escape that may not be canonical starts there."""
    letters = np.frombuffer(text, np.uint8)
    behind = letters[1:]
    found = behind == _U
    found |= behind == _SLASH
    found &= letters[:-1] == _BACKSLASH
    return found


def _is_escaped(text: bytes, at: int) -> bool:
    """Whether the backslash there is the second one of an escaped backslash."""
    return (at - len(text[:at].rstrip(b"\\"))) % 2 == 1


@lru_cache(4096)
def _fixed(escapes: bytes) -> bytes | None:
    """Consecutive escapes as they are to be; None if they are not valid, or not certain to stand in a string.

    Outside of one they are an error, which must not become JSON by being mended.
    """
    try:
        fixed = orjson.dumps(orjson.loads(b'"%b"' % escapes))[1:-1]
    except orjson.JSONDecodeError:
        return None
    return fixed if fixed.translate(None, _OUTSIDE) else None
