"""One way to fail: a single clear line on stderr and an exit code that is not 0."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Input that the user can mend; the message says what is wrong, where, and what to do."""


def cli(main: Callable[[], None]) -> None:
    """Run an entrypoint's ``main``; a :class:`UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        raise SystemExit(130) from None
