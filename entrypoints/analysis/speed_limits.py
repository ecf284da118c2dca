"""The most that skipping can save on a GPU, by operations and bytes, for the shapes of the published checkpoints.

    python entrypoints/analysis/speed_limits.py --output figures/speed_limits.json
No GPU is needed: see utils/speed/limits.py for what is counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoConfig

from router_tuning.errors import UserError, cli
from router_tuning.evaluation.output import write_json
from router_tuning.speed.limits import ACCELERATORS, GRANULARITIES, Workload, limit, limits_table
from router_tuning.tuning.arguments import ROOT

FOLDERS = ("llama3-8b-mod", "mistral-7b-mod", "qwen-2.5-7b-mod")
PREFILL, PAST, BATCHES = (512, 2048, 8192, 32768), (512, 8192, 32768), (1, 8, 32)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folders", nargs="+", default=FOLDERS, help="folders under ckpt; their config.json is enough"
    )
    parser.add_argument("--accelerator", choices=ACCELERATORS, default="h200")
    parser.add_argument("--capacities", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    for capacity in args.capacities:
        if not 0 <= capacity <= 1:
            raise UserError(f"--capacities {capacity} must lie in [0, 1]")
    return args


def main() -> None:
    args = parse_args()
    accelerator = ACCELERATORS[args.accelerator]
    works = [("prefill", Workload(b, t, 0)) for t in PREFILL for b in BATCHES]
    works += [("decode", Workload(b, 1, past)) for past in PAST for b in BATCHES]
    rows = []
    for folder in args.folders:
        path = ROOT / "ckpt" / folder
        if not (path / "config.json").is_file():
            raise UserError(f"--folders {folder}: no {path / 'config.json'}")
        config = AutoConfig.from_pretrained(path)
        n = config.num_hidden_layers // 2
        for phase, work in works:
            for granularity in GRANULARITIES:
                for capacity in args.capacities:
                    found = limit(config, work, granularity, n, capacity, accelerator)
                    rows.append(
                        {
                            "model": folder.removesuffix("-mod"),
                            "phase": phase,
                            "batch": work.batch,
                            "length": work.tokens if phase == "prefill" else work.past,
                            "granularity": granularity,
                            "capacity": capacity,
                            **{key: float(f"{value:.5g}") for key, value in found.items()},
                        }
                    )
    command = f"python entrypoints/analysis/speed_limits.py --accelerator {args.accelerator} --output {args.output}"
    write_json(args.output, {"command": command, "accelerator": vars(accelerator), "rows": rows})
    print(limits_table(rows, args.folders[0].removesuffix("-mod")).text())


if __name__ == "__main__":
    cli(main)
