"""Score a dense base, a tuned run or an export with lm-eval, and note what every task cost.

    python entrypoints/evaluate/evaluate_mod.py --base ckpt/tiny-llama-mod --output dense.jsonl
    python entrypoints/evaluate/evaluate_mod.py --run trained_models/tiny-llama-mod/... --flops 0.9
    python entrypoints/evaluate/evaluate_mod.py --base ckpt/mistral-7b-mod --tasks mod_paper --batch_size 8
    python entrypoints/evaluate/evaluate_mod.py --model exports/my-export --flops 0.9
Several GPUs: accelerate launch entrypoints/evaluate/evaluate_mod.py ... (each process takes a share of the documents).
Writes one record; results_table.py puts records of several files side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.checkpoint.loading import add_arguments, is_export, load_dense, opened
from router_tuning.errors import UserError, at_least, cli, parser_of
from router_tuning.evaluation.records import task_table
from router_tuning.evaluation.scoring import Benchmark, score
from router_tuning.evaluation.tasks import requested_tokens
from router_tuning.files import write_text
from router_tuning.tuning.duration import LONG, in_words, reading_rate
from router_tuning.tuning.encoding import load_tokenizer


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    add_arguments(parser, export=True)
    parser.add_argument("--tasks", nargs="+", default=["mod_heldout"], help="lm-eval tasks or groups")
    parser.add_argument("--limit", type=at_least(1), help="documents per task")
    parser.add_argument("--num_fewshot", type=at_least(0), help="examples in the prompt (default: what the task says)")
    parser.add_argument("--batch_size", type=batch_size, default=16, help="a number, or auto")
    parser.add_argument("--metadata", type=json_object, default={}, help="JSON passed to the tasks")
    parser.add_argument("--output", type=Path, help="results file (default: below the run's folder)")
    args = parser.parse_args()
    args.tuned = args.run or args.model
    if not (args.tuned or args.base):
        raise UserError("name what to score: --run (tuned), --model (an export) or --base (dense)")
    if not args.tuned and (args.capacity, args.flops) != (None, None):
        raise UserError("--capacity and --flops turn the dial of trained routers: name them with --run or --model")
    if not args.tuned and is_export(args.base):
        raise UserError(f"--base {args.base} is an export, which would run dense here: name it with --model")
    return args


def batch_size(text: str) -> int | str:
    """Type of an argument."""
    return text if text == "auto" else at_least(1)(text)


def json_object(text: str) -> dict[str, Any]:
    """Type of an argument."""
    if not isinstance(found := json.loads(text), dict):
        raise ValueError
    return found


def tell_cost(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say how long the reading takes, and where that is hours, what makes it minutes."""
    tokens = requested_tokens(args.tasks, args.limit, tokenizer, args.num_fewshot, args.metadata)
    seconds = tokens / reading_rate(model)
    told = f"estimate: about {in_words(seconds)} to read {tokens:,} tokens, beside what is generated"
    if seconds > LONG:
        told += "; --limit 100 scores the first 100 documents of each task"
    print(told, file=sys.stderr)


def main() -> None:
    args = parse_args()
    if args.tuned:
        model, tokenizer, base, _ = opened(args, flops=args.flops)
    else:
        model, tokenizer, base = load_dense(args.base, args.dtype), load_tokenizer(args.base), args.base
    options = {name: getattr(args, name) for name in ("batch_size", "limit", "num_fewshot", "metadata")}
    if int(os.environ.get("RANK", 0)) == 0:
        tell_cost(args, model, tokenizer)
    benchmark = Benchmark(args.tasks, options)
    axis, budget = ("flops", args.flops) if args.capacity is None else ("capacity", args.capacity)
    cell = {"policy": "routed" if args.tuned else "dense", "recipe": args.tuned and args.tuned.name, "budget": budget}
    record = score(benchmark, model, model, tokenizer, cell)
    if record is None:
        return
    label = "dense" if not args.tuned else "tuned" if budget is None else f"tuned-{axis}-{budget:g}"
    output = args.output or (args.tuned or Path("runs") / base.name) / "evaluation" / f"{label}.jsonl"
    write_text(output, json.dumps(record) + "\n")
    print(task_table([record]).text())
    print(f"results: {output}")


if __name__ == "__main__":
    cli(main)
