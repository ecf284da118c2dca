"""Bring base weights and tokenizer into ckpt/<folder_name>, by link: no shard is copied.

python entrypoints/checkpoint/prepare_base.py --folder_name mistral-7b-mod                          # from the hub
python entrypoints/checkpoint/prepare_base.py --folder_name mistral-7b-mod --source /models/mistral  # local
"""

from __future__ import annotations

import argparse
from pathlib import Path

from router_tuning.checkpoint.prepare_base import prepare_base
from router_tuning.errors import UserError, cli

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Parse, link, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder_name", required=True, help="folder under --ckpt_root, for example mistral-7b-mod")
    parser.add_argument("--source", help="hub id or local folder; default: mod_base of the folder's config.json")
    parser.add_argument("--revision", help="revision on the hub")
    parser.add_argument("--link", choices=("symlink", "hard"), default="symlink")
    parser.add_argument("--ckpt_root", type=Path, default=ROOT / "ckpt")
    args = parser.parse_args()
    folder = args.ckpt_root / args.folder_name
    if not (folder / "config.json").is_file():
        known = sorted(path.parent.name for path in args.ckpt_root.glob("*/config.json"))
        raise UserError(f"--folder_name {args.folder_name}: no {folder / 'config.json'}; there are {', '.join(known)}")
    done = prepare_base(folder, args.source, args.revision, args.link)
    for name in done.linked:
        print(f"linked     {name}")
    for name in done.unchanged:
        print(f"unchanged  {name}")
    print(f"{done.folder} holds the base weights and tokenizer of {done.source}")


if __name__ == "__main__":
    cli(main)
