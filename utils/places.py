"""Where things lie: beside the package in a checkout; inside it, or in the working folder, where it is installed."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

CHECKOUT = (_PACKAGE.parent / "pyproject.toml").is_file()
ROOT = _PACKAGE.parent if CHECKOUT else Path.cwd()
"""What is brought and made lies under it: ``ckpt``, ``data``, ``trained_models``, ``figures``."""
SHIPPED = _PACKAGE.parent if CHECKOUT else _PACKAGE
"""What comes with the code lies under it: ``configs`` and ``entrypoints``."""


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the hub's (``owner/name``), and no path below a folder that is here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).parent.is_dir()
