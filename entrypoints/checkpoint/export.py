"""Export a tuned run for stock tools (transformers, lm-eval, peft).

    python entrypoints/checkpoint/export.py --run trained_models/tiny-llama-mod/alpaca/... --output exports/tiny
    lm_eval --model hf --model_args pretrained=exports/tiny,trust_remote_code=True --tasks ...
Forms: full (a checkpoint folder), adapter (routers alone, for load_routers), peft (LoRA and routers beside a routed
base), merged (a checkpoint folder with LoRA merged into its weights). A form refuses what it would leave out.
An export stands alone: what is done to it never reaches the base, and it needs no other folder (with --weights link it
does).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from router_tuning.checkpoint.card import model_card
from router_tuning.checkpoint.exporting import FORMS, export
from router_tuning.errors import UserError, cli, parser_of
from router_tuning.evaluation.records import COMPARISON, all_tables, read_records
from router_tuning.tuning.run_folder import base_of


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the tuning run")
    parser.add_argument("--base", type=Path, help="folder of the base checkpoint (default: the one the run names)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--form", choices=FORMS, default="full")
    parser.add_argument(
        "--weights", choices=("copy", "link"), default="copy", help="of the base; copies share blocks where they can"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.run.is_dir():
        raise UserError(f"--run {args.run} is no folder; name the output folder of a tuning run")
    comparison = args.run / COMPARISON
    tables = all_tables(read_records(comparison)) if comparison.is_file() else []
    scores = "\n\n".join(table.markdown() for table in tables) or None
    card = model_card(args.run, args.form, scores)
    base = None if args.form == "adapter" else base_of(args.run, args.base)
    size = export(args.run, base, args.output, args.form, card, args.overwrite, args.weights == "link")
    print(f"{args.output}: {size:,} bytes written")
    if args.form != "adapter":
        peft = f",peft={args.output}" if args.form == "peft" else ""
        folder = args.output / "base" if args.form == "peft" else args.output
        print(f"lm_eval --model hf --model_args pretrained={folder}{peft},trust_remote_code=True --tasks ...")


if __name__ == "__main__":
    cli(main)
