"""Bring a base's weights and tokenizer into ckpt/<folder_name>: a folder that is there, or any new name.

    python entrypoints/checkpoint/prepare_base.py --folder_name mistral-7b-mod                          # from the hub
    python entrypoints/checkpoint/prepare_base.py --folder_name mistral-7b-mod --source /models/mistral # local folder
    python entrypoints/checkpoint/prepare_base.py --folder_name my-base --source base.Q4_K_M.gguf       # dequantised
    python entrypoints/checkpoint/prepare_base.py --folder_name my-base --source Qwen/Qwen2.5-0.5B-Instruct
A new name gets a config.json of its own, with the deepest half of the layers routed.
"""

from __future__ import annotations

import re
from pathlib import Path

from router_tuning.bases.preparing import prepare_base
from router_tuning.errors import UserError, cli, parser_of
from router_tuning.places import ROOT


def main() -> None:
    """Parse, bring, report."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder_name", required=True, help="folder under --ckpt_root, for example mistral-7b-mod")
    parser.add_argument("--source", help="hub id, local folder or .gguf file; default: mod_base of the config.json")
    parser.add_argument("--revision", help="revision on the hub")
    parser.add_argument("--ckpt_root", type=Path, default=ROOT / "ckpt")
    args = parser.parse_args()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.folder_name):
        raise UserError(
            f"--folder_name {args.folder_name!r} cannot name a folder: use letters, digits, '.', '-' and '_'"
        )
    folder = args.ckpt_root / args.folder_name
    source, files = prepare_base(folder, args.source, args.revision)
    print(f"{folder} holds the base of {source}: {', '.join(files)}")


if __name__ == "__main__":
    cli(main)
