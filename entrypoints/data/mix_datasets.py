"""Mix reformatted data sets by portion, shuffled, with provenance in mix.json.

python entrypoints/data/mix_datasets.py --reformatted_dir ./data/reformatted --save_path ./data/mixed
python entrypoints/data/mix_datasets.py --portion alpaca=1 vicuna_sharegpt=0 --cap alpaca=1000 --dedup
"""

from __future__ import annotations

import argparse
from pathlib import Path

from router_tuning.data.mix_plan import PUBLISHED_PORTIONS, PUBLISHED_SEED, make_plan
from router_tuning.data.mixing import mix
from router_tuning.errors import cli, parser_of
from router_tuning.places import ROOT

DEFAULTS = ", ".join(f"{name} {float(portion):g}" for name, portion in PUBLISHED_PORTIONS.items())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--reformatted_dir", type=Path, default=ROOT / "data" / "reformatted")
    parser.add_argument("--save_path", type=Path, default=ROOT / "data" / "mixed")
    parser.add_argument(
        "--config", type=Path, help="YAML with portions, caps, seed, dedup (see configs/data/mix.yaml)"
    )
    parser.add_argument(
        "--portion",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help=f"change portions; 0 leaves a set out. Default: {DEFAULTS}. alpaca is reformatted, "
        "but part of a mix only if given a portion: --portion alpaca=1",
    )
    parser.add_argument("--cap", nargs="+", default=[], metavar="NAME=ROWS", help="at most so many rows of a set")
    parser.add_argument("--dedup", action="store_true", default=None, help="leave out rows whose messages came before")
    parser.add_argument("--seed", type=int, help=f"default: {PUBLISHED_SEED}")
    return parser.parse_args()


def main() -> None:
    """Parse, mix, report."""
    args = parse()
    plan = make_plan(args.config, args.portion, args.cap, args.seed, args.dedup)
    report = mix(plan, args.reformatted_dir, args.save_path)
    print(f"{'data set':<18}{'rows':>10}{'duplicates':>12}{'portion':>9}{'mixed':>10}")
    for name, row in report["sets"].items():
        portion = f"{float(plan.portions[name]):g}"
        print(f"{name:<18}{row['rows']:>10,}{row['duplicates']:>12,}{portion:>9}{row['mixed']:>10,}")
    print(f"{report['rows']:,} rows in {args.save_path / 'data.jsonl'}, sha256 {report['sha256'][:16]}…, in mix.json")


if __name__ == "__main__":
    cli(main)
