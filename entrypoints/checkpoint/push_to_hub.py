"""Upload an export to the hub (private unless --public), or only say what would be uploaded.

    python entrypoints/checkpoint/push_to_hub.py --folder exports/tiny --repo_id NAME/tiny-router-tuned --dry_run
The token is that of `hf auth login` or of the environment variable HF_TOKEN.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from router_tuning.checkpoint.freeze import MARKER
from router_tuning.errors import UserError, cli, parser_of
from router_tuning.model.saving import CONFIG_NAME

MARKERS = (CONFIG_NAME, "adapter_config.json", MARKER)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="an export")
    parser.add_argument("--repo_id", required=True, help="owner/name")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--message", default="Router-Tuning export", help="of the commit")
    parser.add_argument("--dry_run", action="store_true", help="check, and list what would be uploaded")
    return parser.parse_args()


def uploaded_files(folder: Path, repo_id: str) -> dict[str, int]:
    """``{name: bytes}`` of what would be uploaded.

    Raises:
        UserError: for a folder that is no export, holds pickled weights or links to nothing, for a model card whose
            front matter is not valid, and for a repository name that the hub refuses.
    """
    if not any((folder / marker).is_file() for marker in MARKERS):
        raise UserError(f"--folder {folder} holds neither {' nor '.join(MARKERS)}: export a run first")
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    if pickled := [path.name for path in paths if path.suffix in PICKLES]:
        raise UserError(f"{folder}: {', '.join(pickled)} may run code when loaded; an export holds safetensors only")
    if gone := [path for path in paths if not path.exists()]:
        raise UserError(f"{gone[0]} links to {gone[0].readlink()}, which is gone: export the run anew")
    try:
        validate_repo_id(repo_id)
        ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{folder} to {repo_id}: {' '.join(str(error).split())}") from None
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def main() -> None:
    args = parse_args()
    files = uploaded_files(args.folder, args.repo_id)
    if args.dry_run:
        print("\n".join(f"{size:>15,}  {name}" for name, size in files.items()))
        print(f"{sum(files.values()):>15,}  bytes to {args.repo_id}, {'public' if args.public else 'private'} if new")
        return
    api = HfApi()
    try:
        api.create_repo(args.repo_id, private=not args.public, exist_ok=True)
        options = {"folder_path": str(args.folder), "commit_message": args.message}
        print(api.upload_folder(repo_id=args.repo_id, **options).commit_url)
    except (OSError, ValueError, RuntimeError) as error:  # the hub's answers among them
        raise UserError(f"{args.repo_id} was not uploaded: {' '.join(str(error).split())}") from None


if __name__ == "__main__":
    cli(main)
