"""Show what a training file looks like to a model: rows with the loss mask visible, token lengths.

python entrypoints/data/preview_data.py --data_file data/mixed/data.jsonl --tokenizer ckpt/tiny-llama-mod
"""

from __future__ import annotations

import sys
from pathlib import Path

from router_tuning.errors import UserError, cli, parser_of
from router_tuning.places import ROOT


def main() -> None:
    """Parse, show."""
    parser = parser_of(__doc__)
    parser.add_argument("--data_file", type=Path, default=ROOT / "data" / "mixed" / "data.jsonl")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--preview", type=int, default=3, metavar="N", help="rows to show (default 3)")
    parser.add_argument("--max_seq_length", type=int, default=2048)
    parser.add_argument(
        "--chat_template",
        nargs="?",
        const="own",
        default="auto",
        choices=("auto", "own", "published"),
        help="the rendering; auto: the tokenizer's own template if it has one",
    )
    parser.add_argument("--measured_rows", type=int, default=10_000, help="rows to measure; 0: all (default 10,000)")
    args = parser.parse_args()
    for name in ("preview", "measured_rows"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} must be at least 0")
    if args.max_seq_length < 1:
        raise UserError(f"--max_seq_length must be at least 1, not {args.max_seq_length}")
    from router_tuning.tuning.preview import report  # brings transformers, seconds that --help does not need

    measured = args.measured_rows or None
    colour = sys.stdout.isatty()
    print(
        report(args.data_file, args.tokenizer, args.preview, args.max_seq_length, args.chat_template, measured, colour)
    )


if __name__ == "__main__":
    cli(main)
