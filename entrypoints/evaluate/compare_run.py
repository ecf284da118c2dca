"""Compare a tuned run with its dense base, with static removal at the same operations, and with random decisions.

    python entrypoints/evaluate/compare_run.py --run trained_models/tiny-llama-mod/mixed/...
    python entrypoints/evaluate/compare_run.py --run OURS --flops 0.75 --beside PUBLISHED
A run of another recipe is turned to what the first one leaves of the operations; one without a dial is calibrated.
Writes evaluation/comparison.jsonl and report.md under the run, in the place of those of an earlier comparison.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from router_tuning.checkpoint.loading import add_arguments, load_dense, load_tuned, opened
from router_tuning.errors import UserError, at_least, cli, parser_of
from router_tuning.evaluation.comparison import comparison_table, legend, reading
from router_tuning.evaluation.controls import random_masks, removal_order, removed
from router_tuning.evaluation.documents import encoded, longest, prompt_batches, read_rows, rendered
from router_tuning.evaluation.records import COMPARISON, difference_table, task_table
from router_tuning.evaluation.scoring import Benchmark, score, scored_parts
from router_tuning.files import write_text
from router_tuning.model import set_thresholds
from router_tuning.model.dial import Batch, calibrate
from router_tuning.model.saving import thresholds_for
from router_tuning.places import ROOT
from router_tuning.tuning.batching import Collator, inputs_to_calibrate_on, is_sequence_level
from router_tuning.tuning.run_folder import data_of, read_run


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--beside", type=Path, help="folder of another run on this base, of another recipe")
    parser.add_argument("--tasks", nargs="*", default=["mod_heldout"], help="lm-eval tasks or groups")
    parser.add_argument("--limit", type=at_least(1), help="documents per task")
    parser.add_argument("--batch_size", type=at_least(1), default=32)
    parser.add_argument("--prompts", type=Path, nargs="+", help="rows for divergence and cost (default: held-out)")
    parser.add_argument("--prompts_per_file", type=at_least(1), default=16)
    parser.add_argument("--search_rows", type=Path, help="JSONL rows for the static search (default: the run's data)")
    parser.add_argument("--search_count", type=at_least(1), default=256)
    parser.add_argument("--new_tokens", type=at_least(1), default=16, help="tokens of the timed generation")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="timed rounds")
    args = parser.parse_args()
    for name in ("run", "beside"):
        if (folder := getattr(args, name)) is not None and not folder.is_dir():
            raise UserError(f"--{name} {folder} is no folder; name the output folder of a tuning run")
    if args.beside and recipe_of(args.beside) == recipe_of(args.run):
        raise UserError(f"--beside {args.beside} is of the recipe of --run, {recipe_of(args.run)}: one name, two rows")
    if (args.search_rows or data_of(args.run)) is None:
        raise UserError(f"{args.run}/run.json names no data; give rows for the static search with --search_rows")
    return args


def turned(base: Path, run: Path, dtype: str, share: float, batches: Sequence[Batch]) -> PreTrainedModel:
    """What a run trained, with thresholds at which ``share`` of the operations is left on ``batches``."""
    model = load_tuned(base, run, dtype=dtype)
    try:
        set_thresholds(model, thresholds_for({"dial": calibrate(model, batches)}, share, run, "flops"))
    except ValueError as error:
        raise UserError(f"--beside {run}: {error}") from None
    return model


def main() -> None:
    args = parse_args()
    tuned, tokenizer, base, _ = opened(args, flops=args.flops)
    collate, dense = Collator(tokenizer), load_dense(base, args.dtype)
    length = longest(dense, tokenizer)
    files = args.prompts or sorted((ROOT / "data/sample/heldout").glob("*.jsonl"))
    asked = [row for file in files for row in read_rows(file, args.prompts_per_file)]
    shown = [text for _, text in rendered(asked, tokenizer)]
    benchmark = Benchmark(
        tasks=args.tasks,
        evaluation={"limit": args.limit, "batch_size": args.batch_size},
        texts={"answers": encoded(asked, tokenizer, length)},
        prompts=prompt_batches(shown, tokenizer, args.batch_size),
        timing={"new_tokens": args.new_tokens, "repeats": args.repeats},
    )
    cell = {"recipe": recipe_of(args.run), "budget": args.flops if args.capacity is None else args.capacity}
    records = [score(benchmark, dense, dense, tokenizer, {"policy": "dense"})]
    ours = score(benchmark, dense, tuned, tokenizer, {"policy": "routed", **cell})
    if ours is None:
        raise UserError("a comparison runs in one process; score single models in parallel with evaluate_mod.py")
    records.append(ours)
    search = encoded(read_rows(args.search_rows or data_of(args.run), args.search_count), tokenizer, length)
    if args.beside:
        batches = inputs_to_calibrate_on(search, collate, is_sequence_level(tuned))
        other = turned(base, args.beside, args.dtype, ours["share"], batches)
        beside = {"policy": "routed", "recipe": recipe_of(args.beside), "budget": cell["budget"]}
        records.append(score(benchmark, dense, other, tokenizer, beside))
    rates = scored_parts(ours)
    order = removal_order(dense, tuned, search, collate, min(part["share"] for part in rates.values()))
    for policy, under in {
        "random": lambda name: random_masks(tuned, rates[name]["capacity"], seed=0),
        "static": lambda name: removed(tuned, order, rates[name]["share"]),
    }.items():
        timed = policy != "random"  # its modules run as often as the routed ones
        records.append(score(benchmark, dense, tuned, tokenizer, {"policy": policy, **cell}, under, timed))
    records[-1]["removed"] = order
    write_text(args.run / COMPARISON, "".join(json.dumps(record) + "\n" for record in records))
    table, words = comparison_table(records), f"{reading(records)}\n\n{legend(records)}"
    others = [other for other in (difference_table(records), task_table(records)) if other is not None]
    parts = [f"# {base.name}: {args.run.name}", table.markdown(), words, *(other.markdown() for other in others)]
    report = write_text(args.run / "report.md", "\n\n".join(parts) + "\n")
    print(f"{table.text()}\n\n{words}\n\nreport: {report}")


def recipe_of(run: Path) -> str:
    """Name of the recipe that tuned a run."""
    return read_run(run).get("arguments", {}).get("recipe", "routed")


if __name__ == "__main__":
    cli(main)
