"""Measure what skipping saves: dense and routed side by side in one process, prefill and decode apart.

The committed CPU numbers (hidden 512, 8 layers, 4 routed; prefill 4 × 512, decode after 256 tokens):

    python entrypoints/analysis/benchmark_speed.py --output figures/benchmark_speed_cpu.json

A checkpoint with its own decisions instead of forced masks of random weights:

    python entrypoints/analysis/benchmark_speed.py --model DIR --capacities own --output out.json
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from router_tuning.data.pages import keep_freed_pages
from router_tuning.errors import UserError, cli
from router_tuning.model import GRANULARITIES, is_routed, unroute
from router_tuning.provenance import provenance
from router_tuning.speed.benchmark import Setting, benchmark
from router_tuning.speed.figure import draw_speed
from router_tuning.speed.ideal import shared_copy
from router_tuning.tuning.arguments import ROOT

SHAPES = {
    "small": LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=2048, max_position_embeddings=4096,
    ),
    "llama3-8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072,
    ),
    "mistral-7b": MistralConfig(max_position_embeddings=131072, sliding_window=None),
    "qwen2.5-7b": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, max_position_embeddings=131072,
    ),
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Command line; lists are comma-separated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="random weights of this architecture")
    parser.add_argument("--model", help="a routed checkpoint instead of --shape")
    parser.add_argument("--mod_n", type=int, help="routed layers (default: half)")
    parser.add_argument("--phases", default="prefill,decode")
    parser.add_argument("--granularities", default=",".join(GRANULARITIES[:-1]))
    parser.add_argument("--kv_policies", default="keep", help="keep and/or drop, for token-level attention and block")
    parser.add_argument(
        "--capacities", default="0,0.25,0.5,0.75,1", help="forced, or 'own' for the routers' decisions"
    )
    parser.add_argument("--batches", help="default: 4 for prefill, 1 for decode")
    parser.add_argument("--lengths", help="default: 512 for prefill, 256 for decode")
    parser.add_argument("--repeats", type=int, default=15, help="rounds per build; ten times as many in decode")
    parser.add_argument("--builds", type=int, default=3, help="how often the models of a cell are built anew")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pages", choices=("keep", "release"), default="keep", help="what freed memory the process keeps; see README"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON; a figure of the same name goes beside it")
    return parser.parse_args()


def settings(args: argparse.Namespace, layers: int) -> list[Setting]:
    """All cells that the arguments ask for."""
    n = args.mod_n or layers // 2
    if not 1 <= n < layers:
        raise UserError(f"--mod_n {n} must lie in 1…{layers - 1}: the model has {layers} layers")
    routed = list(range(layers - 1 - n, layers - 1))
    cells = []
    for phase in args.phases.split(","):
        if phase not in ("prefill", "decode"):
            raise UserError(f"--phases {phase!r}: choose from prefill, decode")
        batches = args.batches or ("4" if phase == "prefill" else "1")
        lengths = args.lengths or ("512" if phase == "prefill" else "256")
        for batch in map(int, batches.split(",")):
            for length in map(int, lengths.split(",")):
                for granularity in args.granularities.split(","):
                    for policy in args.kv_policies.split(","):
                        if policy == "drop" and granularity not in ("attn_token", "block_token"):
                            continue
                        capacities = [None if c == "own" else float(c) for c in args.capacities.split(",")]
                        repeats = args.repeats * (10 if phase == "decode" else 1)
                        cell = Setting(phase, batch, length, granularity, policy, routed, capacities, repeats)
                        cell.builds, cell.seed = args.builds, args.seed
                        cells.append(cell)
    return cells


def load(args: argparse.Namespace):
    """The dense model, and the routed one where a checkpoint was named."""
    automatic = "bfloat16" if args.device.startswith("cuda") else "float32"
    dtype = getattr(torch, automatic if args.dtype == "auto" else args.dtype)
    if args.model is None:
        torch.manual_seed(args.seed)
        with torch.device(args.device):
            return AutoModelForCausalLM.from_config(SHAPES[args.shape], dtype=dtype).eval(), None
    routed = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, use_safetensors=True).to(args.device).eval()
    if not is_routed(routed):
        raise UserError(f"--model {args.model}: holds no routed layers")
    return unroute(shared_copy(routed)), routed


def main() -> None:
    args = parse_args()
    kept = args.pages == "keep" and keep_freed_pages()
    dense, routed = load(args)
    rows = []
    head = f"{'phase':8} {'b×t':>9} {'granularity':22} {'kv':5} {'cap':>5} {'speed-up':>8} {'ideal':>7} {'effic.':>7}"
    tqdm.write(head)
    for setting in tqdm(settings(args, dense.config.num_hidden_layers), desc="cells", leave=False):
        if routed is not None:
            base = routed.model.mod_config
            setting.mod_layers, setting.granularity, setting.kv_policy = (
                base.mod_layers,
                base.granularity,
                base.kv_policy,
            )
        for row in benchmark(dense, setting, routed):
            rows.append(row)
            efficiency = "–" if row["skip_efficiency"] is None else f"{row['skip_efficiency']:.2f}"
            slower = " slower than dense" if row["slower_than_dense"] else ""
            tqdm.write(
                f"{row['phase']:8} {row['batch']:>3}×{row['length']:<5} {row['granularity']:22} {row['kv_policy']:5} "
                f"{row['capacity']:5.2f} {row['speed_up']:7.3f}× {1 / row['ideal_ratio']:6.3f}× {efficiency:>7}"
                + slower
            )
        write(args, rows, kept)
    draw_speed(rows, args.output.with_suffix(".svg"))
    tqdm.write(f"wrote {args.output} and {args.output.with_suffix('.svg')}")


def write(args: argparse.Namespace, rows: list[dict], kept: bool) -> None:
    """The JSON so far; replaced whole after every cell, so that an interrupted run keeps what it measured."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    inside = args.output.resolve().is_relative_to(ROOT)
    given = vars(args) | {"output": args.output.resolve().relative_to(ROOT) if inside else args.output}
    command = "python entrypoints/analysis/benchmark_speed.py " + " ".join(
        f"--{key} {value}" for key, value in given.items() if value is not None
    )
    content = {"command": command, **provenance(), "shape": args.model or args.shape, "pages_kept": kept, "rows": rows}
    temporary = args.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, args.output)


if __name__ == "__main__":
    cli(main)
