"""Measure what skipping saves: dense and routed side by side in one process, in turns.

    python entrypoints/analysis/benchmark_speed.py --output out.jsonl                # hidden 512, 8 layers, 4 routed
    python entrypoints/analysis/benchmark_speed.py --model DIR --output out.jsonl    # the shape of a base
    python entrypoints/analysis/benchmark_speed.py --phases tune,train --output out.jsonl
A phase is prefill, decode, tune (a training step of the routers), train (of all weights) or compiled (dense decoding
in its fastest stock form), with its size where that is not the usual one: prefill:4x2048, or decode:1x2048x32 for
batch, tokens before and tokens timed. Cells that the output holds already, of the same settings, are not measured
again. Real size on a GPU: scripts/gpu_speed.sh.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import re
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from router_tuning.bases.description import dense_config
from router_tuning.checkpoint.loading import is_export, load_dense
from router_tuning.errors import UserError, at_least, cli, parser_of
from router_tuning.files import read_json_lines
from router_tuning.model import ModConfig
from router_tuning.places import ROOT
from router_tuning.provenance import provenance
from router_tuning.speed.benchmark import Setting, benchmark, routed_copy
from router_tuning.speed.cells import Cell, Row, free_memory, measured, run_cells
from router_tuning.speed.steps import compiled_decode, training_step
from router_tuning.speed.table import line_of, speed_tables

BASES = ("llama3-8b", "mistral-7b", "qwen-2.5-7b")
SMALL = {
    "small": LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, vocab_size=2048
    ),
    "tiny": LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256,
    ),
}  # fmt: skip
PHASES = {"prefill": (4, 512, 0), "decode": (1, 256, 0), "tune": (8, 128, 3), "train": (8, 128, 3)}
PHASES["compiled"] = (1, 256, 64)
"""Batch, length and rounds (in decoding, tokens); 0: as ``--repeats`` says."""
CHOOSE = {"phases", "granularities", "kv_policies", "minutes", "output"}
"""Arguments that say which cells are measured, not how."""
_OF_MALLOC = (-1, -3)
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""


def parse_args() -> argparse.Namespace:
    """Command line; lists are comma-separated."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--shape", choices=(*SMALL, *BASES), default="small", help="random weights of this architecture"
    )
    parser.add_argument("--model", type=Path, help="folder of a base instead of --shape")
    parser.add_argument("--mod_n", type=at_least(1), help="routed layers (default: half)")
    parser.add_argument("--phases", default="prefill,decode", help="what is timed, in this order, each with its size")
    parser.add_argument("--granularities", default="attn_sequence,attn_token,mlp_sequence,mlp_token")
    parser.add_argument("--kv_policies", default="keep", help="keep and/or drop, for token-level attention and block")
    parser.add_argument("--skips", default="zero", help="skip paths: zero, mean and/or low_rank")
    parser.add_argument("--capacities", default="0,0.5,1", help="shares that run, by random masks")
    parser.add_argument("--repeats", type=at_least(2), default=15, help="rounds per build; in decode ten times")
    parser.add_argument("--builds", type=at_least(1), default=3, help="how often the models of a cell are built anew")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--profile", action="store_true", help="profile a dense and a routed pass of each cell too")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="no cell starts that would end later than this"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    args = parser.parse_args()
    if args.model and args.shape != parser.get_default("shape"):
        raise UserError(f"--shape {args.shape} is that of --model {args.model}: leave one of them out")
    try:
        on_gpu = torch.device(args.device).type == "cuda"
    except RuntimeError:
        raise UserError(f"--device {args.device} is no device of torch's: cpu, cuda, cuda:1, …") from None
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no GPU; rehearse on a CPU with --shape tiny --device cpu")
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
    found = [
        ModConfig(mod_layers=layers, granularity=granularity, kv_policy=policy)
        for granularity, policy in itertools.product(args.granularities.split(","), args.kv_policies.split(","))
        if policy == "keep" or {"attn_token", "block_token"} & set(granularity.split("+"))
    ]
    if not found:
        raise UserError(f"--kv_policies {args.kv_policies} is for attn_token, block_token, not {args.granularities}")
    return found


def cells(args: argparse.Namespace, dense: PreTrainedModel) -> list[Cell]:
    """All cells that the arguments ask for."""
    capacities = tuple(map(float, args.capacities.split(",")))
    if wrong := [capacity for capacity in capacities if not 0 <= capacity <= 1]:
        raise UserError(f"--capacities {wrong[0]} must lie in [0, 1]")
    wanted = routings(args, dense.config.num_hidden_layers)
    skips = tuple(replace(wanted[0], skip=skip).skip for skip in args.skips.split(","))
    found = []
    for phase, batch, length, rounds in phases(args.phases):
        kind = f"{phase} {batch}x{length}"
        if phase in ("prefill", "decode"):
            rounds = rounds or args.repeats * (10 if phase == "decode" else 1)
            for one in wanted:
                setting = Setting(phase, batch, length, one, capacities, rounds, skips, args.builds, args.profile)
                name = f"{kind} {one.granularity} {one.kv_policy}"
                found.append(Cell(name, kind, lambda setting=setting: timed_rows(dense, setting)))
            continue

        def step(phase: str = phase, shape: tuple[int, int] = (batch, length), rounds: int = rounds) -> list[Row]:
            about = {"phase": phase, "batch": shape[0], "length": shape[1], "granularity": wanted[0].granularity}
            if phase == "compiled":
                return [about | compiled_decode(dense, *shape, rounds)]
            return [about | training_step(routed_copy(dense, wanted[0]), *shape, rounds, phase == "train")]

        found.append(Cell(kind, phase, step))
    return found


def timed_rows(dense: PreTrainedModel, setting: Setting) -> list[Row]:
    """The setting with all its skip paths in turns or, where the memory does not hold so many caches, one by one."""
    try:
        return benchmark(dense, setting)
    except torch.OutOfMemoryError:
        if len(setting.skips) == 1:
            raise
    free_memory()
    return [row for skip in setting.skips for row in benchmark(dense, replace(setting, skips=(skip,)))]


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The dense model; random weights are made on their device."""
    device = torch.device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if args.model is None:
        config = SMALL[args.shape] if args.shape in SMALL else dense_config(ROOT / "ckpt" / f"{args.shape}-mod")
        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    if is_export(args.model):
        raise UserError(f"--model {args.model} is an export: name its base; compare_run.py times what a run decides")
    return load_dense(args.model, dtype).to(device)


def keep_freed_pages() -> None:
    """Have this process keep what it frees, as other allocators do by themselves, where it can be told so.

    By default the C library of Linux gives large blocks back at once or not, as the heap happens to lie: a forward
    pass then faults some ten thousand pages in, or none, whatever it computes. That is up to a quarter of its time,
    and more than the difference between a dense model and a routed one.
    """
    with suppress(OSError, AttributeError, TypeError):  # another system, or another library
        for option in _OF_MALLOC:
            ctypes.CDLL(None).mallopt(option, 1 << 30)


def main() -> None:
    args = parse_args()
    phases(args.phases)
    keep_freed_pages()
    dense = load(args)
    try:
        wanted = cells(args, dense)
    except ValueError as error:
        raise UserError(str(error)) from None
    command = shlex.join(["python", "entrypoints/analysis/benchmark_speed.py", *sys.argv[1:]])
    settings = {name: str(value) for name, value in vars(args).items() if name not in CHOOSE}
    about = {"command": command, **provenance(), "settings": settings}
    ready = (time.time() - psutil.Process().create_time()) / 60
    rows = []
    for row in run_cells(wanted, args.output, about, args.minutes - ready):
        rows.append(row)
        tqdm.write(line_of(row))
    for table in speed_tables(measured(read_json_lines(args.output), about)).values():
        print(f"\n{table.text()}")
    print(f"output: {args.output}")
    if rows and all("failed" in row for row in rows):
        raise UserError(f"every cell failed, the first by {rows[0]['failed']}")


if __name__ == "__main__":
    cli(main)
