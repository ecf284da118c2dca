"""Step time and memory of router-tuning beside full tuning and beside gradients forced through every layer.

    python entrypoints/analysis/training_cost.py                               # the embedded base
    python entrypoints/analysis/training_cost.py --hidden 512 --layers 16      # a random Llama of that shape
All three run in one process, in turns; writes figures/training_cost.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from router_tuning.checkpoint.loading import default_device, load_dense
from router_tuning.errors import UserError, cli, parser_of
from router_tuning.evaluation.tables import Table
from router_tuning.files import write_json
from router_tuning.model import ModConfig, route
from router_tuning.places import ROOT
from router_tuning.provenance import provenance
from router_tuning.speed.tuning_step import MODES, measure_steps


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "ckpt" / "tiny-llama-mod")
    parser.add_argument("--hidden", type=int, help="a random Llama of this width instead of --base")
    parser.add_argument("--layers", type=int, default=12, help="of the random Llama")
    parser.add_argument("--mod_n", type=int, help="routed layers (default: half)")
    parser.add_argument("--granularity", default="attn_sequence")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "figures" / "training_cost.json")
    args = parser.parse_args()
    for name in ("batch_size", "length", "rounds", "layers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
    return args


def build(args: argparse.Namespace) -> PreTrainedModel:
    """A fresh routed model."""
    torch.manual_seed(0)
    if args.hidden is None:
        model = load_dense(args.base, "float32")
    else:
        config = LlamaConfig(
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=max(1, args.hidden // 64),
            vocab_size=2048,
        )
        model = LlamaForCausalLM(config).to(default_device())
    layers = model.config.num_hidden_layers
    try:
        return route(model, mod_n=args.mod_n or layers // 2, granularity=args.granularity)
    except ValueError as error:
        raise UserError(str(error)) from None


def main() -> None:
    args = parse_args()
    model = build(args)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (args.batch_size, args.length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    batch = {key: value.to(model.device) for key, value in batch.items()}
    found = measure_steps(lambda: build(args), batch, args.rounds)
    shape = {
        "layers": model.config.num_hidden_layers,
        "routed": len(ModConfig.read_from(model.config).layers),
        "hidden": model.config.hidden_size,
        "granularity": args.granularity,
        "batch": [args.batch_size, args.length],
        "base": str(args.base.name) if args.hidden is None else None,
    }
    command = "python entrypoints/analysis/training_cost.py" + (
        "" if args.hidden is None else f" --hidden {args.hidden}"
    )
    write_json(args.output, {"command": command, "shape": shape, **found, "provenance": provenance()})
    rows = [[mode, found[mode]["seconds"], found[mode]["step_bytes"] / 1e6] for mode in MODES]
    print(Table(["trains", "seconds per step", "MB held"], rows).text())
    for other in ("forced", "full"):
        ratio = found[f"routers_to_{other}"]
        print(f"routers / {other}: time {ratio['time']:.2f}, memory {ratio['step']:.2f}")
    print(f"output: {args.output}")


if __name__ == "__main__":
    cli(main)
