"""Render the tables of README.md, docs/*.md and the embedded base's card, and the picture, from the committed JSON.

python entrypoints/analysis/update_readme.py
"""

from __future__ import annotations

import argparse

from router_tuning.errors import UserError, cli
from router_tuning.experiments.readme import draw_front, render
from router_tuning.files import write_text
from router_tuning.places import ROOT


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args()
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("ckpt/*/README.md"))):
        try:
            text = render(page.read_text())
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{page.relative_to(ROOT)}: {error}") from None
        write_text(page, text)
    draw_front()


if __name__ == "__main__":
    cli(main)
