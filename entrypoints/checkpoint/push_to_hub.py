"""Upload an export to the hub (private unless --public).

    python entrypoints/checkpoint/push_to_hub.py --folder exports/tiny --repo_id NAME/tiny-router-tuned
The token is that of `hf auth login` or of the environment variable HF_TOKEN.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from router_tuning.checkpoint.hub import push_export, uploaded_files
from router_tuning.errors import UserError, cli, parser_of


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="an export")
    parser.add_argument("--repo_id", required=True, help="owner/name")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--message", default="Router-Tuning export", help="of the commit")
    parser.add_argument("--dry_run", action="store_true", help="check, and list what would be uploaded")
    parser.add_argument("--endpoint", help="another hub than the environment's HF_ENDPOINT")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.folder.is_dir():
        raise UserError(f"--folder {args.folder} is no folder")
    if args.dry_run:
        files = uploaded_files(args.folder, args.repo_id)
        print("\n".join(f"{size:>15,}  {name}" for name, size in files.items()))
        print(f"{sum(files.values()):>15,}  bytes to {args.repo_id}, {'public' if args.public else 'private'} if new")
        return
    print(push_export(args.folder, args.repo_id, not args.public, args.message, args.endpoint))


if __name__ == "__main__":
    cli(main)
