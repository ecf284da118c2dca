"""Import routers that the published code saved, so that everything here (export, evaluation, report) can use them.

    python entrypoints/checkpoint/import_routers.py --source CHECKPOINT --base ckpt/mistral-7b-mod \
        --granularity attn_sequence --output trained_models/mistral-7b-mod/published
CHECKPOINT is a folder with safetensors; of its weights only the routers are read.
"""

from __future__ import annotations

from pathlib import Path

from router_tuning.checkpoint.import_published import import_published
from router_tuning.errors import cli, parser_of


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base that they were trained on")
    parser.add_argument("--granularity", default="attn_sequence", help="of the published run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier import")
    args = parser.parse_args()
    layers = import_published(args.source, args.base, args.output, args.granularity, args.overwrite)
    print(f"{args.output}: routers of layers {', '.join(map(str, layers))}, {args.granularity}")


if __name__ == "__main__":
    cli(main)
