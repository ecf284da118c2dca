"""Convert raw data sets to ``{"dataset", "id", "messages"}`` JSONL.

    python entrypoints/data/reformat_datasets.py --raw_data_root ./data/raw --save_path ./data/reformatted
    python entrypoints/data/reformat_datasets.py --datasets alpaca --source alpaca=tatsu-lab/alpaca
    python entrypoints/data/reformat_datasets.py --workers 6 --resume
Each data set is a folder (or file) <raw_data_root>/<name> with .json (an array), .jsonl, either of them .gz or .zst,
.parquet or .arrow files, also many of them, also as downloaded from the hub. Which rows are left out, and why, is
in docs/data.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from router_tuning.data.formats import FORMATS
from router_tuning.data.reformat import Outcome, Settings, reformat
from router_tuning.data.sources import locate
from router_tuning.errors import UserError, cli, parser_of
from router_tuning.places import ROOT

WORKERS = min(2, os.cpu_count() or 1)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--raw_data_root", type=Path, default=ROOT / "data" / "raw")
    parser.add_argument("--save_path", type=Path, default=ROOT / "data" / "reformatted")
    parser.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(FORMATS)}; default: those that are there. A set named here must be there",
    )
    parser.add_argument(
        "--source",
        nargs="+",
        default=[],
        metavar="NAME=WHERE",
        help="read a set from this file, folder or hub id (owner/name) instead",
    )
    parser.add_argument(
        "--workers", type=int, default=WORKERS, help="data sets at a time; the files do not depend on it"
    )
    parser.add_argument("--resume", action="store_true", help="keep data sets that are complete, from these files")
    parser.add_argument(
        "--max_reject_rate", type=float, default=0.01, help="exit 1 if a larger share of rows is refused (faulty)"
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 if any row is left out, faulty or filtered")
    return parser.parse_args()


def places_of(args: argparse.Namespace) -> tuple[dict[str, str | Path], list[str]]:
    """Where the data sets are, and the names of those that are absent; UserError for what was asked for by name."""
    given = dict(text.partition("=")[::2] for text in args.source)
    unknown = [name for name in (*given, *(args.datasets or ())) if name not in FORMATS]
    if unknown or not all(given.values()):
        raise UserError(f"unknown data set {', '.join(unknown)}; known: {', '.join(FORMATS)}, as --source NAME=WHERE")
    if not args.raw_data_root.is_dir() and not given:
        raise UserError(f"--raw_data_root {args.raw_data_root} is no folder; put the raw data sets there, or name it")
    names = args.datasets or list(FORMATS)
    places = {name: given.get(name) or locate(name, args.raw_data_root) for name in names}
    absent = [name for name, place in places.items() if place is None]
    if absent and (args.datasets or len(absent) == len(places)):
        raise UserError(f"{', '.join(absent)}: no such folder or file under {args.raw_data_root}")
    return {name: place for name, place in places.items() if place is not None}, absent


def table(outcomes: list[Outcome]) -> str:
    """Accepted and left out, by data set and reason."""
    lines = [f"{'data set':<18}{'rows':>11}{'accepted':>11}{'filtered':>10}{'refused':>9}  left out by reason"]
    for outcome in outcomes:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in outcome.reasons.items())
        note = "not published" if outcome.error else "complete before" if outcome.resumed else ""
        lines.append(
            f"{outcome.name:<18}{outcome.rows:>11,}{outcome.accepted:>11,}{outcome.filtered:>10,}"
            f"{outcome.refused:>9,}  {'; '.join(filter(None, (reasons, note)))}".rstrip()
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, convert, report."""
    args = parse()
    places, absent = places_of(args)
    settings = Settings(args.workers, args.resume, args.max_reject_rate, args.strict)
    outcomes = reformat(places, args.save_path, settings)
    print(table(outcomes))
    print(f"absent under {args.raw_data_root}, not converted: {', '.join(absent)}\n" if absent else "", end="")
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        sys.stderr.write(f"error: {outcome.error}\n")
    if failed:
        raise SystemExit(1 if all(outcome.too_many for outcome in failed) else 2)
    print(f"rows in {args.save_path}/<name>/data.jsonl, rows left out in rejects.jsonl beside it")


if __name__ == "__main__":
    cli(main)
