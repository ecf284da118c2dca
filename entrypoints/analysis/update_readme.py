"""Render the README's tables anew from the committed JSON.

python entrypoints/analysis/update_readme.py
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from router_tuning.errors import UserError, cli
from router_tuning.experiments.readme import render

README = Path(__file__).resolve().parents[2] / "README.md"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args()
    try:
        text = render(README.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None
    temporary = README.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, README)


if __name__ == "__main__":
    cli(main)
