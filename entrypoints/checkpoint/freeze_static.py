"""Freeze a learned policy: modules that (nearly) never run go for good, all others always run, no custom code is left.

    python entrypoints/checkpoint/freeze_static.py --run RUN --rows data/sample/heldout --output exports/frozen
    python entrypoints/checkpoint/freeze_static.py --run RUN --rows ROWS --drop 5.attn 8.attn --output exports/frozen
A routed block is taken out of the decoder, which saves work in every runtime. An attention or MLP is silenced (its
output projection becomes zero): any runtime gives the right numbers, none saves the work. The loss before and after is
measured on --rows and written into the model card.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from router_tuning.bases.description import read_config
from router_tuning.checkpoint.card import front_matter, training_facts
from router_tuning.checkpoint.freeze import freeze, write_frozen
from router_tuning.checkpoint.loading import add_arguments, load_dense, opened
from router_tuning.errors import UserError, at_least, cli, parser_of
from router_tuning.evaluation.documents import encoded, longest, read_rows
from router_tuning.evaluation.tables import Table
from router_tuning.evaluation.texts import answer_loss
from router_tuning.model import record_routing, routed_modules
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.run_folder import read_run, trained


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    add_arguments(parser, dial=())
    parser.add_argument(
        "--rows", type=Path, nargs="+", required=True, help="JSONL files or folders: what is measured on"
    )
    parser.add_argument("--rows_per_file", type=at_least(1), default=64)
    parser.add_argument("--max_use", type=float, default=0.02, help="drop modules that run for at most this share")
    parser.add_argument("--drop", nargs="+", help="drop these routers' modules instead, as 5.attn 9.block")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier frozen checkpoint")
    args = parser.parse_args()
    if not 0 <= args.max_use < 1:
        raise UserError(f"--max_use {args.max_use} must lie in [0, 1)")
    return args


def main() -> None:
    args = parse_args()
    if trained(args.run) == "routers and LoRA":
        raise UserError(f"--run {args.run} trained LoRA, too, which no frozen checkpoint holds: freeze one without")
    files = [file for path in args.rows for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"--rows {' '.join(map(str, args.rows))}: no .jsonl files there")
    rows = [row for file in files for row in read_rows(file, args.rows_per_file)]
    model, tokenizer, base, _ = opened(args)
    length = longest(model, tokenizer)
    measured_on = encoded(rows, tokenizer, length), Collator(tokenizer)
    with torch.no_grad(), record_routing(model) as log:
        routed_loss = answer_loss(model, *measured_on)
    shares = log.capacity()
    capacity = {name: float(shares[module.mod_key]) for name, module in routed_modules(model).items()}
    dropped = args.drop or [name for name, share in capacity.items() if share <= args.max_use]
    if not dropped:
        used = ", ".join(f"{name} {share:.3f}" for name, share in capacity.items())
        raise UserError(
            f"no module runs for at most {args.max_use:g} of the rows ({used}): raise --max_use, or use --drop"
        )
    frozen = freeze(model, dropped)
    losses = {"dense": answer_loss(load_dense(base, args.dtype), *measured_on), "routed": routed_loss}
    losses["frozen"] = answer_loss(model, *measured_on)
    what = [f"layers {', '.join(map(str, frozen.removed))} removed"] if frozen.removed else []
    what += [f"{', '.join(frozen.silenced)} silenced"] if frozen.silenced else []
    what += [f"their skip paths have no place in a plain checkpoint: {', '.join(frozen.lost)}"] if frozen.lost else []
    table = Table(["model", "loss on the answers (nats per token)"], list(losses.items()), digits=4)
    parts = [
        front_matter(str(read_config(base).get("mod_base"))),
        f"# {base.name}, frozen routing",
        f"From the routers of `{args.run.name}`: {'; '.join(what)}; everything else always runs. "
        f"A plain `{model.config.model_type}` checkpoint.",
        f"```bash\npython entrypoints/checkpoint/freeze_static.py {shlex.join(sys.argv[1:])}\n```",
        table.markdown(),
        f"Measured on {len(rows)} rows.",
        *training_facts(read_run(args.run)),
    ]
    facts = vars(frozen) | {"capacity": capacity, "loss": losses, "rows": len(rows)}
    write_frozen(model, tokenizer, args.output, facts, "\n\n".join(parts) + "\n", args.overwrite)
    print(f"{table.text()}\n{args.output}: {'; '.join(what)}")


if __name__ == "__main__":
    cli(main)
