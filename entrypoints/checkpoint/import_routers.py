"""Import routers that the published code saved, so that everything here (export, evaluation, report) can use them.

    python entrypoints/checkpoint/import_routers.py --source CHECKPOINT --folder_name mistral-7b-mod \
        --granularity attn_sequence --output trained_models/mistral-7b-mod/published
CHECKPOINT is a safetensors file or a folder with one; of its weights only the routers are read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from router_tuning.checkpoint.import_published import import_published
from router_tuning.errors import UserError, cli, parser_of
from router_tuning.places import ROOT


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="safetensors file or checkpoint folder")
    parser.add_argument("--folder_name", help="folder of the base under ckpt/")
    parser.add_argument("--base", type=Path, help="folder of the base, if not under ckpt/")
    parser.add_argument("--granularity", default="attn_sequence", help="of the published run")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the published run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier import")
    args = parser.parse_args()
    if (args.base is None) == (args.folder_name is None):
        raise UserError("name the base of these routers: --folder_name (under ckpt/) or --base (any folder)")
    return args


def main() -> None:
    args = parse_args()
    base = args.base or ROOT / "ckpt" / args.folder_name
    layers = import_published(args.source, base, args.output, args.granularity, args.threshold, args.overwrite)
    print(f"{args.output}: routers of layers {', '.join(map(str, layers))}, {args.granularity}")


if __name__ == "__main__":
    cli(main)
