"""A page that shows the routing: one self-contained HTML file, and its data as JSON beside it.

    python entrypoints/analysis/routing_report.py --run trained_models/tiny-llama-mod/... --prompts data/sample/heldout
    python entrypoints/analysis/routing_report.py --model exports/tiny --prompts prompts.jsonl --output report.html
PROMPTS are JSONL files with messages, or a folder of them; per file a seeded sample is shown. A picture of the page:
    chromium --headless --window-size=1200,1480 --screenshot=report.png "file:///…/routing_report.html#prompt=0"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from router_tuning.checkpoint.loading import add_arguments, opened
from router_tuning.errors import UserError, at_least, cli, parser_of
from router_tuning.evaluation.documents import encoded, longest, read_rows, rendered
from router_tuning.files import write_json, write_text
from router_tuning.model.saving import read_router_config, thresholds_for
from router_tuning.provenance import provenance
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.run_folder import data_of, read_run, training_log
from router_tuning.viewer.routing_page import routing_page
from router_tuning.viewer.routing_trace import collect, dial_curve

DIAL = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    add_arguments(parser, export=True, dial=["capacity"])
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSONL files or folders of them")
    parser.add_argument("--per_file", type=at_least(1), default=4, help="prompts shown per file")
    parser.add_argument("--dial_rows", type=at_least(0), default=4, help="rows per file of the dial curve, 0: none")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=32)
    parser.add_argument("--output", type=Path, help="HTML file (default: routing_report.html in the run or model)")
    args = parser.parse_args()
    if args.output and args.output.suffix == ".json":
        raise UserError(f"--output {args.output} is to be a page; its data go into a .json file beside it")
    return args


def jsonl_files(paths: list[Path]) -> list[Path]:
    """The files that ``--prompts`` names; a folder stands for all JSONL files in it."""
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"--prompts {' '.join(map(str, paths))}: no .jsonl files there")
    return files


def metadata(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, str]:
    """What the page says of the run."""
    found: dict[str, Any] = {"model": args.run or args.model}
    fields = ("mod_granularity", "mod_layers", "mod_router_pooling", "mod_kv_policy", "mod_threshold")
    found |= {name.removeprefix("mod_"): getattr(model.config, name) for name in fields}
    record = read_run(args.run) if args.run else {}
    arguments = record.get("arguments", {})
    names = ("recipe", "target_capacity", "gradient_scale", "learning_rate", "num_train_epochs", "max_train_samples")
    found |= {name: arguments[name] for name in names if arguments.get(name) is not None}
    if args.run and data_of(args.run):
        found["data"] = f"{record['data']['rows']} rows, sha256 {record['data']['sha256'][:16]}"
    origin = provenance()
    found |= {"made": origin["date"], "commit": origin["git_commit"], "device": origin["device"]}
    return {name: str(value) for name, value in found.items() if value is not None}


def main() -> None:
    args = parse_args()
    model, tokenizer, base, routers = opened(args)
    name = (args.model or base).resolve().name
    files = jsonl_files(args.prompts)
    rows = [row for file in files for row in read_rows(file, args.per_file)]
    rows = [row for row, _ in rendered(rows, tokenizer)]
    data = collect(model, tokenizer, rows, args.max_new_tokens)
    data["dial"], config = [], read_router_config(routers)
    if args.dial_rows and config.get("dial"):
        points = {f"capacity {share:g}": thresholds_for(config, share, routers) for share in DIAL}
        dial_rows = [row for file in files for row in read_rows(file, args.dial_rows, seed=7)]
        length = longest(model, tokenizer)
        data["dial"] = dial_curve(model, encoded(dial_rows, tokenizer, length), Collator(tokenizer), points)
    data["training"] = training_log(args.run) if args.run else []
    data["metadata"] = metadata(args, model)
    output = args.output or (args.run or args.model) / "routing_report.html"
    write_text(output, routing_page(data, f"Routing of {name}, {model.config.mod_granularity}"))
    write_json(output.with_suffix(".json"), data)
    print(output)


if __name__ == "__main__":
    cli(main)
