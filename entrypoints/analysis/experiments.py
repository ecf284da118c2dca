"""Run what is missing of an experiment, then build its tables and its figure.

    python entrypoints/analysis/experiments.py configs/experiments/smollm2.yaml
    python entrypoints/analysis/experiments.py configs/experiments/smollm2.yaml --only dense static
    python entrypoints/analysis/experiments.py configs/experiments/smollm2.yaml --build_only
    python entrypoints/analysis/experiments.py configs/experiments/smollm2.yaml --shard 1/2  # elsewhere: 2/2
One line per cell in figures/experiments/<name>.jsonl; a cell whose line is there is not run again while its settings
stay, so the command may be killed and repeated. Shards need nothing of each other: the lines of several machines are
put together with cat. Tables: figures/experiments/<name>.md, and in README.md by update_readme.py.
"""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path

from router_tuning.errors import UserError, cli, parser_of
from router_tuning.evaluation.figures import quality_figure
from router_tuning.evaluation.records import difference_table, read_records, summary_table
from router_tuning.experiments.laboratory import Laboratory, shard
from router_tuning.experiments.plan import read_plan
from router_tuning.files import write_text
from router_tuning.places import ROOT
from router_tuning.tuning.trainer.console import set_up_logs


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("plan", type=Path, help="experiment file, see configs/experiments")
    parser.add_argument("--results", type=Path, default=ROOT / "figures" / "experiments", help="folder of results")
    parser.add_argument("--work", type=Path, default=ROOT / "trained_models" / "experiments", help="trained routers")
    parser.add_argument("--only", nargs="+", default=[], help="run cells whose name contains one of these")
    parser.add_argument("--shard", default="1/1", help="which share of the cells to run, as 2/4")
    parser.add_argument("--estimate", action="store_true", help="run nothing; say how long it takes")
    parser.add_argument("--build_only", action="store_true", help="run nothing; tables and figure of what is there")
    args = parser.parse_args()
    if args.build_only and (args.only or args.estimate or args.shard != "1/1"):
        raise UserError("--build_only runs no cell: leave out --only, --shard and --estimate, which choose some")
    number, count = map(int, args.shard.split("/")) if re.fullmatch(r"\d+/\d+", args.shard) else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard {args.shard}: write which share of how many, as 2/4")
    args.shard = number, count
    return args


def main() -> None:
    args = parse_args()
    plan = read_plan(args.plan)
    results = args.results / f"{plan.name}.jsonl"
    if not args.build_only:
        set_up_logs(0)
        logging.getLogger().setLevel(logging.WARNING)
        lab = Laboratory(plan, results, args.work)
        groups = [
            [cell for cell in group if not args.only or any(part in cell.name for part in args.only)]
            for group in shard(plan.groups(), *args.shard)
        ]
        if not any(groups):
            names = ", ".join(cell.name for group in plan.groups() for cell in group)
            raise UserError(f"no cell of this shard is named like --only {' '.join(args.only)}; cells: {names}")
        print(lab.estimate(groups))
        if args.estimate:
            return
        lab.run(groups)
    records = read_records(results)
    tables = [table for table in (summary_table(records), difference_table(records)) if table is not None]
    print("\n\n".join(table.text() for table in tables))
    print(write_text(results.with_suffix(".md"), "\n\n".join(table.markdown() for table in tables) + "\n"))
    if figure := quality_figure(records, results.with_suffix(".svg")):
        print(figure)


if __name__ == "__main__":
    cli(main)
