"""Show what a training file looks like to a model: rows with the loss mask visible, token lengths.

python entrypoints/data/preview_data.py --data_file data/mixed/data.jsonl --tokenizer ckpt/tiny-llama-mod
"""

from __future__ import annotations

from pathlib import Path

from router_tuning.errors import at_least, cli, parser_of
from router_tuning.places import ROOT


def main() -> None:
    """Parse, show."""
    parser = parser_of(__doc__)
    parser.add_argument("--data_file", type=Path, default=ROOT / "data" / "mixed" / "data.jsonl")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--preview", type=at_least(0), default=3, metavar="N", help="rows to show (default 3)")
    parser.add_argument("--max_seq_length", type=at_least(1), default=2048)
    parser.add_argument("--chat_template", default="auto", choices=("auto", "own", "published"))
    args = parser.parse_args()
    from router_tuning.tuning.preview import report  # brings transformers, seconds that --help does not need

    print(report(args.data_file, args.tokenizer, args.preview, args.max_seq_length, args.chat_template))


if __name__ == "__main__":
    cli(main)
