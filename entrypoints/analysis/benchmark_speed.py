"""Measure what skipping saves: dense and routed side by side in one process, in turns.

    python entrypoints/analysis/benchmark_speed.py --output out.jsonl                # hidden 512, 8 layers, 4 routed
    python entrypoints/analysis/benchmark_speed.py --model DIR --output out.jsonl    # a base, or a routed checkpoint
    python entrypoints/analysis/benchmark_speed.py --phases tune,train --output out.jsonl
A phase is prefill, decode, tune (a training step of the routers), train (of all weights) or compiled (dense decoding
in its fastest stock form), with its size where that is not the usual one: prefill:4x2048, or decode:1x2048x32 for
batch, tokens before and tokens timed. Cells that the output holds already are not measured again. Real size on a GPU:
scripts/gpu_speed.sh.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from router_tuning.errors import UserError, cli, parser_of
from router_tuning.files import read_json_lines
from router_tuning.model import ModConfig, is_routed, unroute
from router_tuning.provenance import provenance
from router_tuning.speed.benchmark import Setting, benchmark, routed_copy
from router_tuning.speed.cells import Cell, Row, free_memory, measured, run_cells
from router_tuning.speed.ideal import shared_copy
from router_tuning.speed.shapes import SHAPES, random_model
from router_tuning.speed.steps import compiled_decode, training_step
from router_tuning.speed.table import print_rows, speed_tables
from router_tuning.speed.timing import keep_freed_pages

PHASES = {"prefill": (4, 512, 0), "decode": (1, 256, 0), "tune": (8, 128, 3), "train": (8, 128, 3)}
PHASES["compiled"] = (1, 256, 64)
"""Batch, length and rounds (in decoding, tokens); 0: as ``--repeats`` says."""
ROUTING = {"mod_n": None, "granularities": "attn_sequence,attn_token,mlp_sequence,mlp_token", "kv_policies": "keep"}
ROUTING |= {"skips": "zero"}
"""Defaults of what a routed checkpoint says itself."""


def parse_args() -> argparse.Namespace:
    """Command line; lists are comma-separated."""
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="random weights of this architecture")
    parser.add_argument("--model", help="a checkpoint instead of --shape; a routed one decides for itself")
    parser.add_argument("--mod_n", type=int, help="routed layers (default: half)")
    parser.add_argument("--phases", default="prefill,decode", help="what is timed, in this order, each with its size")
    parser.add_argument("--granularities", help=f"default: {ROUTING['granularities']}")
    parser.add_argument("--kv_policies", help="keep (default) and/or drop, for token-level attention and block")
    parser.add_argument("--skips", help="skip paths: zero (default), mean and/or low_rank")
    parser.add_argument("--capacities", help="shares that run, by random masks (default: 0,0.5,1)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds per build; ten times as many in decode")
    parser.add_argument("--builds", type=int, default=3, help="how often the models of a cell are built anew")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pages", choices=("keep", "release"), default="keep", help="freed memory, on a CPU")
    parser.add_argument("--profile", action="store_true", help="profile a dense and a routed pass of each cell too")
    parser.add_argument("--minutes", type=float, help="no cell starts that would end later than this")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.set_defaults(**ROUTING)
    args = parser.parse_args()
    if args.model and args.shape != parser.get_default("shape"):
        raise UserError(f"--shape {args.shape} is that of --model {args.model}: leave one of them out")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no GPU; rehearse on a CPU with --shape tiny --device cpu")
    if args.repeats < 2 or args.builds < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 2, --builds {args.builds} at least 1")
    return args


def phases(text: str) -> list[tuple[str, int, int, int]]:
    """Name, batch, length and rounds of the phases that are asked for."""
    found = []
    for part in text.split(","):
        name, _, size = part.partition(":")
        if name not in PHASES or not re.fullmatch(r"([1-9]\d*x[1-9]\d*(x[1-9]\d*)?)?", size):
            raise UserError(f"--phases {part!r}: choose from {', '.join(PHASES)}, with a size such as :4x512")
        given = tuple(map(int, size.split("x"))) if size else ()
        found.append((name, *given, *PHASES[name][len(given) :]))
    return found


def routings(args: argparse.Namespace, depth: int) -> list[ModConfig]:
    """What is routed of a dense model: the deepest ``--mod_n`` layers but the last."""
    n = args.mod_n or depth // 2
    if not 1 <= n < depth:
        raise UserError(f"--mod_n {n} must lie in 1…{depth - 1}: the model has {depth} layers")
    layers = list(range(depth - 1 - n, depth - 1))
    return [
        ModConfig(mod_layers=layers, granularity=granularity, kv_policy=policy)
        for granularity, policy in itertools.product(args.granularities.split(","), args.kv_policies.split(","))
        if policy == "keep" or {"attn_token", "block_token"} & set(granularity.split("+"))
    ]


def cells(args: argparse.Namespace, dense: PreTrainedModel, routed: PreTrainedModel | None) -> list[Cell]:
    """All cells that the arguments ask for."""
    capacities: tuple[float | None, ...] = (None,)
    if args.capacities or routed is None:
        capacities = tuple(map(float, (args.capacities or "0,0.5,1").split(",")))
    for capacity in capacities:
        if capacity is not None and not 0 <= capacity <= 1:
            raise UserError(f"--capacities {capacity} must lie in [0, 1]")
    if routed is not None:
        wanted, skips = [routed.model.mod_config], (routed.model.mod_config.skip,)
    else:
        wanted = routings(args, dense.config.num_hidden_layers)
        skips = tuple(replace(wanted[0], skip=skip).skip for skip in args.skips.split(","))
    found = []
    for phase, batch, length, rounds in phases(args.phases):
        kind, shape = f"{phase} {batch}x{length}", {"phase": phase, "batch": batch, "length": length}
        if phase in ("prefill", "decode"):
            rounds = rounds or args.repeats * (10 if phase == "decode" else 1)
            for one in wanted:
                options = {"skips": skips, "builds": args.builds, "seed": args.seed, "profiled": args.profile}
                setting = Setting(phase, batch, length, one, capacities, rounds, **options)
                name = f"{kind} {one.granularity} {one.kv_policy}"
                found.append(Cell(name, kind, lambda s=setting: timed_rows(dense, s, routed)))
        else:
            step = (dense, wanted[0], phase, batch, length, max(rounds, 2))
            found.append(Cell(kind, phase, lambda step=step, shape=shape: [shape | step_row(*step)]))
    return found


def timed_rows(dense: PreTrainedModel, setting: Setting, routed: PreTrainedModel | None) -> list[Row]:
    """The setting with all its skip paths in turns or, where the memory does not hold so many caches, one by one."""
    try:
        return benchmark(dense, setting, routed)
    except torch.OutOfMemoryError:
        if len(setting.skips) == 1:
            raise
    free_memory()
    return [row for skip in setting.skips for row in benchmark(dense, replace(setting, skips=(skip,)), routed)]


def step_row(dense: PreTrainedModel, routing: ModConfig, phase: str, batch: int, length: int, rounds: int) -> Row:
    """A step that is timed alone."""
    if phase == "compiled":
        return {"seconds_step": compiled_decode(dense, batch, length, rounds)["seconds"]["median"]}
    found = training_step(routed_copy(dense, routing), batch, length, rounds, everything=phase == "train")
    about = {"granularity": routing.granularity, "spread": found.pop("seconds")}
    return {**about, **found, "seconds_step": about["spread"]["median"] * batch / found["micro_batch"]}


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The dense model, and the routed one where a checkpoint has routers."""
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.model is None:
        return random_model(args.shape, device, dtype, args.seed), None
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, use_safetensors=True).to(device).eval()
    if not is_routed(model):
        return model, None
    for name, default in ROUTING.items():
        if getattr(args, name) != default:
            raise UserError(f"--{name} {getattr(args, name)} is what the checkpoint of --model says: leave it out")
    return unroute(shared_copy(model)), model


def main() -> None:
    args = parse_args()
    phases(args.phases)
    kept = args.pages == "keep" and keep_freed_pages()
    dense, routed = load(args)
    try:
        wanted = cells(args, dense, routed)
    except ValueError as error:
        raise UserError(str(error)) from None
    flags = " ".join(f"--{key} {value}" for key, value in vars(args).items() if value not in (None, False))
    flags = flags.replace("--profile True", "--profile")
    about = {"command": f"python entrypoints/analysis/benchmark_speed.py {flags}", **provenance()}
    about |= {"shape": args.model or args.shape, "pages_kept": kept}
    ready = (time.time() - psutil.Process().create_time()) / 60
    minutes = None if args.minutes is None else args.minutes - ready
    run_cells(wanted, args.output, about, minutes, print_rows(tqdm.write))
    for table in speed_tables(measured(read_json_lines(args.output), about["device"])).values():
        print(f"\n{table.text()}")
    print(f"output: {args.output}")


if __name__ == "__main__":
    cli(main)
