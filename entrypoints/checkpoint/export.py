"""Export a tuned run as a checkpoint folder for stock tools (transformers, lm-eval, peft).

python entrypoints/checkpoint/export.py --run trained_models/tiny-llama-mod/mixed/... --output exports/tiny
lm_eval --model hf --model_args pretrained=exports/tiny,trust_remote_code=True --tasks ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from utils.checkpoint.card import model_card
from utils.checkpoint.export_full import export_full
from utils.checkpoint.run_folder import base_of
from utils.errors import UserError, cli
from utils.evaluation.report import COMPARISON, measured


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the tuning run")
    parser.add_argument("--base", type=Path, help="folder of the base checkpoint (default: the one the run names)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.run.is_dir():
        raise UserError(f"--run {args.run} is no folder; name the output folder of a tuning run")
    base = base_of(args.run, args.base)
    comparison = args.run / COMPARISON
    scores = measured(json.loads(comparison.read_text(encoding="utf-8"))) if comparison.is_file() else None
    report = export_full(args.run, base, args.output, model_card(args.run, base, scores), args.overwrite)
    print(f"{args.output}: {len(report['links'])} files linked to {base}, {report['bytes_added']:,} bytes added")
    print(f"lm_eval --model hf --model_args pretrained={args.output},trust_remote_code=True --tasks ...")


if __name__ == "__main__":
    cli(main)
