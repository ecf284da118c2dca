"""Is a tuned run dynamic? Entropy of its decisions over held-out inputs, and what they tell about the task.

    python entrypoints/analysis/dynamics_report.py --run trained_models/... --capacity 0.5 --output dynamics.json
Sequence level. Gains over the best static and over random masks at the same capacity stand beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from router_tuning.checkpoint.run_folder import base_of, tokenizer_of
from router_tuning.embedded.sample_files import read_heldout
from router_tuning.embedded.sample_tasks import FREE_TASKS, TASKS, generate
from router_tuning.errors import UserError, cli
from router_tuning.evaluation import controls
from router_tuning.evaluation.dynamics import dynamics
from router_tuning.evaluation.models import load_tuned
from router_tuning.evaluation.rows import labelled_batches
from router_tuning.evaluation.tables import Table
from router_tuning.experiments.oracle import at_budget
from router_tuning.experiments.score import score_generation
from router_tuning.files import write_json
from router_tuning.model import routed_modules
from router_tuning.provenance import provenance
from router_tuning.tuning.arguments import ROOT


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder with router.safetensors")
    parser.add_argument("--base", type=Path, help="folder of the base checkpoint (default: the one the run names)")
    parser.add_argument("--capacity", type=float, help="turn the stored dial to this share of the routed work")
    parser.add_argument("--items", type=int, default=64, help="held-out items per task")
    parser.add_argument("--seed", type=int, default=0, help="of the random masks")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.items < 1:
        raise UserError(f"--items {args.items} must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    base = args.base or base_of(args.run)
    model, tokenizer = load_tuned(base, args.run, args.capacity), tokenizer_of(args.run, base)
    if any(module.mod_level != "sequence" for module in routed_modules(model).values()):
        raise UserError(f"{args.run}: token-level routing; its decisions are not one mask per input")
    tasks = [task for task in TASKS if task not in FREE_TASKS]
    held_out = {t: read_heldout(ROOT / "data/sample/heldout" / f"{t}.jsonl")[: args.items] for t in tasks}
    tuned = score_generation(model, tokenizer, held_out)
    capacity = tuned["capacity"]["total"]
    with controls.random_masks(model, capacity, args.seed):
        chance = score_generation(model, tokenizer, held_out)
    static = static_score(model, tokenizer, held_out, tasks, capacity)
    report = {
        "run": str(args.run),
        "capacity": capacity,
        "exact_match": tuned["exact_match"],
        "random_exact_match": chance["exact_match"]["average"],
        "static_exact_match": static,
        **dynamics(tuned["decisions"]),
        "provenance": provenance(),
    }
    if args.output:
        write_json(args.output, report)
    names = list(routed_modules(model))
    rows = [[task, tuned["exact_match"][task], *report["kept_by_task"][task]] for task in tasks]
    print(Table(["task", "exact match", *names], rows, digits=2).text())
    score = tuned["exact_match"]["average"]
    print(
        f"capacity {capacity:.3f}; mask entropy {report['mask_entropy']:.2f} bits, the task tells "
        f"{report['task_information']:.2f}; {report['masks']} masks; exact match {score:.3f}, "
        f"static {static:.3f}, random {report['random_exact_match']:.3f}"
    )


def static_score(model, tokenizer, held_out, tasks: list[str], capacity: float) -> float:
    """Exact match of fixed masks at this capacity, dropped greedily by the loss of fresh training-split items."""
    rows = [{"messages": generate(task, 500_000 + n, "train").messages} for n in range(16) for task in tasks]
    order = controls.greedy_order(model, labelled_batches(rows, tokenizer, 64, 512))
    keys = controls.routers_of(model)
    curve = []
    lower = min(int(capacity * len(keys)), len(keys) - 1)
    for size in (lower, lower + 1):
        with controls.fixed(model, [key for key in keys if key not in order[: len(keys) - size]]):
            curve.append(score_generation(model, tokenizer, held_out)["exact_match"]["average"])
    return at_budget(curve, capacity * len(keys) - lower)


if __name__ == "__main__":
    cli(main)
