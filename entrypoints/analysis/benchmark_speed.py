"""Measure what skipping saves: dense and routed side by side in one process, prefill and decode apart.

The committed CPU numbers (hidden 512, 8 layers, 4 routed; prefill 4 × 512, decode after 256 tokens):

    python entrypoints/analysis/benchmark_speed.py --output figures/benchmark_speed_cpu.jsonl

A checkpoint with its own decisions instead of random weights and masks:

    python entrypoints/analysis/benchmark_speed.py --model DIR --output out.jsonl

Cells that the output holds already are not measured again. Real size on a GPU: scripts/gpu_speed.sh.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from router_tuning.errors import UserError, cli, parser_of
from router_tuning.files import read_json_lines
from router_tuning.model import ModConfig, is_routed, unroute
from router_tuning.provenance import provenance
from router_tuning.speed.benchmark import Setting, benchmark
from router_tuning.speed.cells import Cell, measured, run_cells
from router_tuning.speed.figure import draw_speed
from router_tuning.speed.ideal import shared_copy
from router_tuning.speed.shapes import SHAPES, random_model
from router_tuning.speed.table import print_rows
from router_tuning.speed.timing import keep_freed_pages, measure_ceilings

PHASES = {"prefill": (4, 512, 1), "decode": (1, 256, 10)}
"""Batch and length unless they are given, and rounds per ``--repeats``."""


def parse_args() -> argparse.Namespace:
    """Command line; lists are comma-separated."""
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="random weights of this architecture")
    parser.add_argument("--model", help="a routed checkpoint, instead of --shape and of what would be routed there")
    parser.add_argument("--mod_n", type=int, help="routed layers of --shape (default: half)")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--granularities", default="attn_sequence,attn_token,mlp_sequence,mlp_token")
    parser.add_argument("--kv_policies", default="keep", help="keep and/or drop, for token-level attention and block")
    parser.add_argument("--skips", default="zero", help="skip paths: zero, mean and/or low_rank")
    parser.add_argument(
        "--capacities", help="shares that run, by random masks (default: 0,0.5,1; --model decides itself)"
    )
    parser.add_argument("--batches", help="default: 4 for prefill, 1 for decode")
    parser.add_argument("--lengths", help="default: 512 for prefill, 256 for decode")
    parser.add_argument("--repeats", type=int, default=15, help="rounds per build; ten times as many in decode")
    parser.add_argument("--builds", type=int, default=3, help="how often the models of a cell are built anew")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pages", choices=("keep", "release"), default="keep", help="what freed memory the process keeps"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; a figure of the same name goes beside")
    args = parser.parse_args()
    for name in ("shape", "mod_n", "granularities", "kv_policies", "skips"):
        if args.model and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name} {getattr(args, name)} is what the checkpoint of --model says: leave it out")
    if args.repeats < 2 or args.builds < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 2, --builds {args.builds} at least 1")
    for phase in args.phases.split(","):
        if phase not in PHASES:
            raise UserError(f"--phases {phase!r}: choose from {', '.join(PHASES)}")
    return args


def settings(args: argparse.Namespace, dense: PreTrainedModel, routed: PreTrainedModel | None) -> list[Setting]:
    """All cells that the arguments ask for."""
    depth = dense.config.num_hidden_layers
    n = args.mod_n or depth // 2
    if not 1 <= n < depth:
        raise UserError(f"--mod_n {n} must lie in 1…{depth - 1}: the model has {depth} layers")
    layers = list(range(depth - 1 - n, depth - 1))
    capacities: tuple[float | None, ...] = (None,)
    if args.capacities or routed is None:
        capacities = tuple(map(float, (args.capacities or "0,0.5,1").split(",")))
    routings = [
        ModConfig(mod_layers=layers, granularity=granularity, kv_policy=policy)
        for granularity, policy in itertools.product(args.granularities.split(","), args.kv_policies.split(","))
        if policy == "keep" or {"attn_token", "block_token"} & set(granularity.split("+"))
    ]
    for capacity in capacities:
        if capacity is not None and not 0 <= capacity <= 1:
            raise UserError(f"--capacities {capacity} must lie in [0, 1]")
    skips = tuple(replace(routings[0], skip=skip).skip for skip in args.skips.split(","))
    if routed is not None:
        routings, skips = [routed.model.mod_config], (routed.model.mod_config.skip,)
    cells = []
    for phase in args.phases.split(","):
        batch, length, rounds = PHASES[phase]
        sizes = itertools.product((args.batches or str(batch)).split(","), (args.lengths or str(length)).split(","))
        for (rows, tokens), routing in itertools.product(sizes, routings):
            shape = (phase, int(rows), int(tokens))
            cells.append(Setting(*shape, routing, capacities, args.repeats * rounds, skips, args.builds, args.seed))
    return cells


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The dense model, and the routed one where a checkpoint was named."""
    device = torch.device(args.device)
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, args.dtype or automatic)
    if args.model is None:
        return random_model(args.shape, device, dtype, args.seed), None
    routed = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, use_safetensors=True).to(device).eval()
    if not is_routed(routed):
        raise UserError(f"--model {args.model}: holds no routed layers")
    return unroute(shared_copy(routed)), routed


def main() -> None:
    args = parse_args()
    kept = args.pages == "keep" and keep_freed_pages()
    dense, routed = load(args)
    ceilings = measure_ceilings(dense.device, dense.dtype)

    def cell(setting: Setting) -> Cell:
        kind = f"{setting.phase} {setting.batch}x{setting.length}"
        name = f"{kind} {setting.routing.granularity} {setting.routing.kv_policy}"
        return Cell(name, kind, lambda: benchmark(dense, setting, ceilings, routed))

    try:
        cells = [cell(setting) for setting in settings(args, dense, routed)]
    except ValueError as error:
        raise UserError(str(error)) from None
    flags = " ".join(f"--{key} {value}" for key, value in vars(args).items() if value is not None)
    about = {"command": f"python entrypoints/analysis/benchmark_speed.py {flags}", **provenance()}
    about |= {"shape": args.model or args.shape, "pages_kept": kept, "ceilings": asdict(ceilings)}
    run_cells(cells, args.output, about, report=print_rows(tqdm.write))
    draw_speed(measured(read_json_lines(args.output)), args.output.with_suffix(".svg"))
    print(f"output: {args.output}, {args.output.with_suffix('.svg')}")


if __name__ == "__main__":
    cli(main)
