"""Compare a tuned run with its dense base and with the best static drop of the same capacity.

    python entrypoints/evaluate/compare_run.py --run trained_models/tiny-llama-mod/mixed/...
Writes evaluation/comparison.json, report.md, capacity_by_layer.png and quality_against_compute.png under the run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from router_tuning.checkpoint.run_folder import base_of, data_of, read_run, tokenizer_of, training_log
from router_tuning.errors import UserError, cli
from router_tuning.evaluation.comparison import Plan, compare
from router_tuning.evaluation.figures import capacity_figure, quality_figure
from router_tuning.evaluation.models import load_dense, load_tuned
from router_tuning.evaluation.report import COMPARISON, report, summary_table
from router_tuning.evaluation.results import cost_table, headline, score_table
from router_tuning.evaluation.rows import labelled_batches, prompt_batches, read_rows, rendered
from router_tuning.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[2]


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the tuning run")
    parser.add_argument("--base", type=Path, help="folder of the base checkpoint (default: the one the run names)")
    parser.add_argument("--capacity", type=float, help="turn the stored dial to this share of the routed work")
    parser.add_argument("--tasks", nargs="+", default=["mod_heldout"], help="lm-eval tasks or groups")
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSONL rows for the cost (default: held-out rows)")
    parser.add_argument("--prompts_per_file", type=int, default=16)
    parser.add_argument("--search_rows", type=Path, help="JSONL rows for the static search (default: the run's data)")
    parser.add_argument("--search_count", type=int, default=256)
    parser.add_argument("--curve", action="store_true", help="score the best static mask of every size")
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens of the timed generation")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    return parser.parse_args()


def search_file(args: argparse.Namespace) -> Path:
    """Rows for the static search: given, or those that the run was tuned on."""
    path = args.search_rows or data_of(args.run)
    if path is None:
        raise UserError(f"{args.run}/run.json names no data; give rows for the static search with --search_rows")
    return path


def main() -> None:
    args = parse_args()
    if not args.run.is_dir():
        raise UserError(f"--run {args.run} is no folder; name the output folder of a tuning run")
    base = base_of(args.run, args.base)
    tokenizer = tokenizer_of(args.run, base)
    files = args.prompts or sorted((ROOT / "data/sample/heldout").glob("*.jsonl"))
    asked = [row for file in files for row in read_rows(file, args.prompts_per_file)]
    prompts = [text for _, text in rendered(asked, tokenizer)]
    rows = read_rows(search_file(args), args.search_count)
    dense = load_dense(base, args.dtype)
    tuned = load_tuned(base, args.run, capacity=args.capacity, dtype=args.dtype)
    length = min(tokenizer.model_max_length, dense.config.max_position_embeddings)
    plan = Plan(
        tasks=args.tasks,
        prompts=prompt_batches(prompts, tokenizer, args.batch_size, dense.device),
        search=labelled_batches(rows, tokenizer, args.batch_size, length, dense.device),
        limit=args.limit,
        batch_size=args.batch_size,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        curve=args.curve,
    )
    comparison = compare(dense, tuned, tokenizer, plan)
    write_json(args.run / COMPARISON, comparison)
    figures = [quality_figure(headline(comparison), args.run / "quality_against_compute.png").name]
    if log := training_log(args.run):
        target = read_run(args.run).get("arguments", {}).get("target_capacity")
        figures.insert(0, capacity_figure(log, args.run / "capacity_by_layer.png", target).name)
    write_text(
        args.run / "report.md", report(comparison, read_run(args.run), figures, f"{base.name}: {args.run.name}")
    )
    for table in (score_table(comparison), summary_table(comparison), cost_table(comparison)):
        print("\n" + table.text())
    print(f"\nreport: {args.run / 'report.md'}\nfigures: {', '.join(str(args.run / name) for name in figures)}")


if __name__ == "__main__":
    cli(main)
