"""Upload of an export to the hub, or to anything that speaks its protocol."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from router_tuning.checkpoint.freeze import MARKER
from router_tuning.errors import UserError
from router_tuning.model.saving import CONFIG_NAME

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MARKERS = (CONFIG_NAME, "adapter_config.json", MARKER)


def push_export(
    folder: Path,
    repo_id: str,
    private: bool = True,
    message: str = "Router-Tuning export",
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Create ``repo_id`` if needed, upload ``folder`` in one commit and return the commit's address.

    Linked shards are uploaded as files.

    Raises:
        UserError: for what :func:`uploaded_files` refuses, and for what the hub answers with an error.
    """
    uploaded_files(folder, repo_id)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=message).commit_url
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{repo_id} was not uploaded: {reason}") from None


def uploaded_files(folder: Path, repo_id: str) -> dict[str, int]:
    """``{name: bytes}`` of what would be uploaded.

    Raises:
        UserError: for a folder that is no export, holds pickled weights or links to nothing, for a model card whose
            front matter is not valid, and for a repository name that the hub refuses.
    """
    if not any((folder / marker).is_file() for marker in MARKERS):
        raise UserError(f"{folder} holds neither {' nor '.join(MARKERS)}: export a run first")
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    if pickled := [path.name for path in paths if path.suffix in PICKLES]:
        raise UserError(f"{folder}: {', '.join(pickled)} may run code when loaded; an export holds safetensors only")
    if gone := [path for path in paths if not path.exists()]:
        raise UserError(f"{gone[0]} links to {gone[0].readlink()}, which is gone: export the run anew")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo_id {repo_id}: {error}") from None
    try:
        ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{folder / 'README.md'} is no model card: {' '.join(str(error).split())}") from None
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}
