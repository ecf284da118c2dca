"""What all entrypoints share: one way to parse, and one to fail, a single clear line on stderr and an exit code."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from typing import NoReturn

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""What a system says of a full disk, and of what is not to be read or written."""


class UserError(ValueError):
    """Input that the user can mend; the message says what is wrong, where, and what to do."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows an entrypoint's docstring as it stands, and takes no abbreviated flags."""
    return _Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)


def at_least(least: int) -> Callable[[str], int]:
    """Type of an argument that is a whole number, and no smaller one than ``least``."""

    def whole(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least {least}")
        return int(text)

    return whole


def cli(main: Callable[[], None]) -> None:
    """Run an entrypoint's ``main``; a :class:`UserError`, and a file that the system refuses, becomes one line on
    stderr and exit code 2.
    """
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        sys.stderr.write(f"error: {error.strerror}{f' ({error.filename})' * bool(error.filename)}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        raise SystemExit(130) from None
