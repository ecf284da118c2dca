"""Render the tables of README.md, docs/*.md and the embedded base's card, and the picture, from the committed JSON.

python entrypoints/analysis/update_readme.py
"""

from __future__ import annotations

from router_tuning.errors import UserError, cli, parser_of
from router_tuning.experiments.readme import draw_front, render
from router_tuning.files import write_text
from router_tuning.places import ROOT


def main() -> None:
    parser_of(__doc__).parse_args()
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("ckpt/*/README.md"))):
        try:
            text = render(page.read_text())
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{page.relative_to(ROOT)}: {error}") from None
        write_text(page, text)
    draw_front()


if __name__ == "__main__":
    cli(main)
