"""The speed of routed Llama-3-8B on one GPU, random weights and masks, in at most eight minutes.

    bash scripts/gpu_speed.sh --output figures/gpu_speed.jsonl        # needs no installation of this repository
    bash scripts/gpu_speed.sh --shape tiny --output /tmp/tiny.jsonl   # the same cells, rehearsed on a CPU
A run that was cut goes on with the cells that its file lacks. The table of docs/speed.md is made from
figures/gpu_speed.jsonl by entrypoints/analysis/update_readme.py.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from router_tuning.errors import UserError, cli, parser_of
from router_tuning.files import read_json_lines
from router_tuning.provenance import provenance
from router_tuning.speed.cells import Row, measured, run_cells
from router_tuning.speed.gpu_plan import FULL, TINY, gpu_cells
from router_tuning.speed.shapes import SHAPES, random_model
from router_tuning.speed.table import gpu_tables, print_rows
from router_tuning.speed.timing import measure_ceilings

NEEDED = 75 * 2**30
"""Bytes of 8 billion weights, six caches of 32 × 2,048 tokens, and what a pass needs beside them."""


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b", help="tiny runs small workloads on the CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="no cell starts that would end later than this")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; what it holds already is not repeated")
    return parser.parse_args()


def environment(shape: str) -> Row:
    """The device and the versions; UserError where the full size cannot run."""
    found = provenance()
    print(f"{found['device']}; " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    if shape == "tiny":
        return found
    if not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no GPU; rehearse on a CPU with --shape tiny")
    free, total = torch.cuda.mem_get_info()
    if free < NEEDED:
        print(f"only {free / 2**30:.0f} of {total / 2**30:.0f} GiB are free: the largest cells may fail", flush=True)
    return {**found, "cuda": torch.version.cuda, "memory_bytes": total}


def main() -> None:
    args = parse_args()
    began, tiny = psutil.Process().create_time(), args.shape == "tiny"
    about = environment(args.shape)
    device, dtype = (torch.device("cpu"), torch.float32) if tiny else (torch.device("cuda"), torch.bfloat16)
    ceilings = measure_ceilings(device, dtype)
    print(f"ceilings: {ceilings.operations / 1e12:.3g} TFLOP/s, {ceilings.bandwidth / 1e12:.3g} TB/s")
    dense = random_model(args.shape, device, dtype)
    ready = time.time() - began
    print(f"ready after {ready:.0f} s: {dense.num_parameters() / 1e9:.3g} billion weights", flush=True)

    def rows_so_far() -> list[Row]:
        return measured(read_json_lines(args.output), about["device"])

    cells = gpu_cells(dense, ceilings, TINY if tiny else FULL, rows_so_far)
    about |= {"shape": args.shape, "ceilings": asdict(ceilings)}
    run_cells(cells, args.output, about, args.minutes - ready / 60, print_rows(print))
    for table in gpu_tables(rows_so_far()).values():
        print(f"\n{table.text()}")
    print(f"output: {args.output}")


if __name__ == "__main__":
    cli(main)
