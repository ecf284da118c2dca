"""Convert raw data sets to ``{"dataset", "id", "messages"}`` JSONL.

python entrypoints/data/reformat_datasets.py --raw_data_root ./data/raw --save_path ./data/reformatted
"""

from __future__ import annotations

import argparse
from pathlib import Path

from utils.data.formats import FORMATS
from utils.data.reformat import reformat
from utils.errors import UserError, cli

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Parse, convert, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--raw_data_root", type=Path, default=ROOT / "data" / "raw")
    parser.add_argument("--save_path", type=Path, default=ROOT / "data" / "reformatted")
    parser.add_argument("--datasets", nargs="+", choices=list(FORMATS), help="default: those found")
    args = parser.parse_args()
    if not args.raw_data_root.is_dir():
        raise UserError(f"--raw_data_root {args.raw_data_root} is no folder")
    absent = [name for name in args.datasets or FORMATS if not (args.raw_data_root / name).exists()]
    if absent and args.datasets:
        raise UserError(f"{', '.join(absent)} absent under {args.raw_data_root}")
    if len(absent) == len(FORMATS):
        raise UserError(f"none of {', '.join(FORMATS)} is under {args.raw_data_root}")
    for name in args.datasets or FORMATS:
        if name not in absent:
            counts = reformat(FORMATS[name], args.raw_data_root / name, args.save_path / name)
            if not counts["accepted"]:
                raise UserError(f"{name}: no row was accepted ({dict(counts)})")
            print(f"{name}: {dict(counts)}")
    if absent:
        print(f"absent: {', '.join(absent)}")


if __name__ == "__main__":
    cli(main)
