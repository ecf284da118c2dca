"""An export in vLLM: the same tokens as in transformers, and the throughput beside the dense base.

    python entrypoints/analysis/benchmark_serving.py --export exports/budget --base ckpt/NAME --output serving.jsonl
Runs where vLLM and this package are installed. On a CPU, seconds are those that the processor spent.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from router_tuning.errors import at_least, cli, parser_of
from router_tuning.files import append_json
from router_tuning.model.class_swap import plain_class
from router_tuning.provenance import provenance
from router_tuning.speed.served import SETTINGS, engine, equality, our_tokens, throughput

QUESTIONS = (
    "What is the capital of France?",
    "Add 12 and 3.",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "Give three tips for staying healthy.",
    "Translate 'good morning' into Spanish.",
    "Write a Python function that reverses a string.",
    "List the planets of the solar system.",
)
SYSTEM = "You are a careful assistant, who answers briefly and to the point, and says so where something is unknown. "


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--export", type=Path, required=True, help="an export (full) of token level")
    parser.add_argument("--base", type=Path, required=True, help="folder of its dense base")
    parser.add_argument(
        "--dtypes", nargs="*", default=["float32", "bfloat16"], help="in which tokens are compared; none: not compared"
    )
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[1.0, 0.8, 0.6], help="shares of the FLOPs; none: not timed"
    )
    parser.add_argument("--timed_dtype", default="float32")
    parser.add_argument("--batches", type=at_least(1), nargs="+", default=[1, 16])
    parser.add_argument("--new_tokens", type=at_least(1), default=32)
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, to which what is measured is added")
    return parser.parse_args()


def compare(args: argparse.Namespace, prompts: list[list[int]], note: Callable[..., None]) -> None:
    """Tokens of vLLM in each of its settings beside ours."""
    llm = None
    for dtype in args.dtypes:
        expected = our_tokens(our_model(args.export, dtype), prompts, args.new_tokens)
        for name, settings in SETTINGS.items():
            llm = None  # an engine that ends takes along what those share that its process has then
            gc.collect()
            llm = engine(args.export, dtype, **settings)
            note(dtype=dtype, setting=name, **equality(llm, prompts, expected))


def time_budgets(args: argparse.Namespace, prompts: list[list[int]], note: Callable[..., None]) -> None:
    """Tokens per second of vLLM, with routers at each budget and on the dense base."""
    gc.collect()
    dtype, model = args.timed_dtype, our_model(args.export, args.timed_dtype)
    plain = {"architectures": [plain_class(model).__name__]}
    llms = {"routed": engine(args.export, dtype), "dense": engine(args.base, dtype, hf_overrides=plain)}
    for batch in args.batches:
        timed = (prompts * batch)[:batch]
        for found in throughput(llms, model, args.export, args.budgets, timed, args.new_tokens, args.repeats):
            note(dtype=dtype, batch=batch, **found)


def our_model(export: Path, dtype: str) -> PreTrainedModel:
    """The export in transformers."""
    return AutoModelForCausalLM.from_pretrained(export, dtype=dtype, trust_remote_code=True).eval()


def main() -> None:
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.export)
    texts = [start + question for start in ("", SYSTEM) for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in texts
    ]

    def note(**found: Any) -> None:
        append_json(args.output, {"export": args.export.name, "new_tokens": args.new_tokens, **found})
        print(json.dumps(found), flush=True)

    append_json(args.output, {"run": provenance()})
    if args.dtypes:
        compare(args, prompts, note)
    if args.budgets:
        time_budgets(args, prompts, note)


if __name__ == "__main__":
    cli(main)
