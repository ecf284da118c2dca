"""Run what is missing of an experiment, then build its tables and figures.

    python entrypoints/analysis/experiments.py configs/experiments/main.yaml --workers 2
    python entrypoints/analysis/experiments.py configs/experiments/main.yaml --build_only
One JSON per cell under figures/experiments/<name>; a cell whose JSON is there is never run again, so the command may
be stopped and repeated, and several machines may share the folders. Further workers are further processes.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from router_tuning.errors import UserError, cli
from router_tuning.experiments.plan import Plan, read_plan
from router_tuning.experiments.report import build
from router_tuning.experiments.runner import Laboratory
from router_tuning.tuning.arguments import ROOT
from router_tuning.tuning.console import set_up_logs


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="experiment file, see configs/experiments")
    parser.add_argument("--base", type=Path, help="checkpoint folder instead of the file's")
    parser.add_argument("--results", type=Path, default=ROOT / "figures" / "experiments", help="folder of results")
    parser.add_argument("--work", type=Path, default=ROOT / "trained_models" / "experiments", help="trained routers")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work")
    parser.add_argument("--only", nargs="+", default=[], help="run cells whose name contains one of these")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--build_only", action="store_true", help="run nothing; tables and figures of what is there")
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError(f"--workers {args.workers} must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    plan = read_plan(args.plan)
    plan.base = str(args.base or plan.base)
    plan.seeds = args.seeds or plan.seeds
    lab = Laboratory(plan, args.results / plan.name, args.work / plan.name)
    if not args.build_only:
        others = [subprocess.Popen([*_command(), "--workers", "1"]) for _ in range(args.workers - 1)]
        run_cells(lab, plan, args.only, alone=not others)
        if any(other.wait() for other in others):
            raise UserError("a worker failed; its message is above. Repeat the command to run what is missing")
    for path in build(plan, lab.results, ROOT / "figures"):
        print(path)


def run_cells(lab: Laboratory, plan: Plan, only: list[str], alone: bool) -> None:
    """Go through the cells until nothing is left that can run."""
    set_up_logs(0)
    logging.getLogger().setLevel(logging.WARNING)
    if not alone:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    cells = [cell for cell in plan.cells() if not only or any(part in cell.name for part in only)]
    bar = tqdm(total=len(cells), desc=plan.name)
    while any([lab.run(cell) and not bar.update() for cell in cells]):
        pass
    bar.close()


def _command() -> list[str]:
    """This command again, without its number of workers and without building."""
    argv = sys.argv[1:]
    if "--workers" in argv:
        place = argv.index("--workers")
        argv = argv[:place] + argv[place + 2 :]
    return [sys.executable, __file__, *argv]


if __name__ == "__main__":
    cli(main)
