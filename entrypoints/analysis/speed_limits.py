"""The most that skipping can save on a GPU, by operations and bytes, for the shapes of the published checkpoints.

    python entrypoints/analysis/speed_limits.py --output figures/speed_limits.json
No GPU is needed: see utils/speed/limits.py for what is counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from router_tuning.errors import UserError, cli, parser_of
from router_tuning.files import write_json
from router_tuning.model import ModConfig
from router_tuning.model.configuration_mod import select_layers
from router_tuning.speed.limits import ACCELERATORS, GRANULARITIES, Workload, limit, limits_table
from router_tuning.speed.shapes import BASES, shape_config

PREFILL = ((1, 512), (4, 2048), (1, 8192), (1, 32768))
DECODE = tuple((batch, past) for past in (2048, 8192, 32768) for batch in (1, 8, 32))
WORKLOADS = [("prefill", batch, tokens) for batch, tokens in PREFILL]
WORKLOADS += [("decode", batch, past) for batch, past in DECODE]


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--accelerator", choices=ACCELERATORS, default="h100")
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
    rows = []
    for shape in args.shapes:
        config = shape_config(shape)
        layers = select_layers(config.num_hidden_layers, config.num_hidden_layers // 2, None)
        for phase, batch, length in WORKLOADS:
            work = Workload(batch, length, 0) if phase == "prefill" else Workload(batch, 1, length)
            for granularity in GRANULARITIES:
                routing = ModConfig(mod_layers=layers, granularity=granularity)
                for capacity in args.capacities:
                    found = limit(config, work, routing, capacity, accelerator)
                    about = {"model": shape, "phase": phase, "batch": batch, "length": length}
                    about |= {"granularity": granularity, "capacity": capacity}
                    rows.append(about | {key: float(f"{value:.5g}") for key, value in found.items()})
    command = f"python entrypoints/analysis/speed_limits.py --accelerator {args.accelerator} --output {args.output}"
    write_json(args.output, {"command": command, "accelerator": vars(accelerator), "rows": rows})
    print(limits_table(rows, args.shapes[0]).text())


if __name__ == "__main__":
    cli(main)
