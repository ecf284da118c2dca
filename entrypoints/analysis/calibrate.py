"""Calibrate the budget dial of a tuned run on your own conversations, and store it with the routers.

    python entrypoints/analysis/calibrate.py --run trained_models/... --data data/mixed/data.jsonl
    python entrypoints/analysis/calibrate.py --run trained_models/... --data my.jsonl --flops 0.8 --rows 1000
Every later --flops and --capacity of that run uses it. Here they turn the dial, too: the run then loads, and is
exported, at that budget. Sequence level calibrates on the prompts (what generation decides on), token level on whole
conversations.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from router_tuning.checkpoint.loading import AXES, add_arguments, opened
from router_tuning.errors import UserError, at_least, cli, parser_of
from router_tuning.evaluation.documents import encoded, longest, read_rows
from router_tuning.model import save_routers, set_thresholds
from router_tuning.model.dial import calibrate
from router_tuning.model.saving import read_router_config, thresholds_for
from router_tuning.tuning.batching import Collator, inputs_to_calibrate_on, is_sequence_level

OURS = ("format", "base")


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    add_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="JSONL file with messages")
    parser.add_argument("--rows", type=at_least(1), default=1000, help="conversations, drawn from the file")
    parser.add_argument("--max_seq_length", type=at_least(2), default=2048, help="tokens; longer ones are cut")
    args = parser.parse_args()
    for name in AXES:
        if (share := getattr(args, name)) is not None and not 0 <= share <= 1:
            raise UserError(f"--{name} {share} must lie in [0, 1]")
    return args


def main() -> None:
    args = parse_args()
    config = read_router_config(args.run)
    rows = read_rows(args.data, args.rows)
    model, tokenizer, *_ = opened(args, capacity=None)
    labelled = encoded(rows, tokenizer, min(args.max_seq_length, longest(model, tokenizer)))
    print(f"calibrating on {len(labelled)} conversations", flush=True)
    batches = inputs_to_calibrate_on(labelled, Collator(tokenizer), is_sequence_level(model))
    try:
        dial = calibrate(model, batches, start=config.get("dial"))
    except ValueError as error:
        raise UserError(f"{args.run}: {error}") from None
    for axis in AXES:
        if (share := getattr(args, axis)) is not None:
            set_thresholds(model, thresholds_for({"dial": dial}, share, args.run, axis))
    kept = {key: value for key, value in config.items() if key not in OURS and not key.startswith("mod_")}
    save_routers(model, args.run, extra={**kept, "dial": dial, "base": config["base"]})
    print(f"the dial reaches {dial['flops'][0]:.3f} to 1 of the decoder's operations")
    print(f"output: {args.run}")


if __name__ == "__main__":
    cli(main)
