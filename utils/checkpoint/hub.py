"""Upload of an export to the hub, or to anything that speaks its protocol."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from router_tuning.errors import UserError
from router_tuning.model.saving import CONFIG_NAME

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MARKERS = (CONFIG_NAME, "adapter_config.json")


def push_export(
    folder: Path,
    repo_id: str,
    private: bool = True,
    message: str = "Router-Tuning export",
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Create ``repo_id`` if needed, upload ``folder`` in one commit and return the commit's address.

    Linked shards are uploaded as files. Raises :class:`UserError` for a folder that is no export or holds pickled
    weights, for a repository name that the hub refuses, and for what the hub answers with an error.
    """
    if not any((folder / marker).is_file() for marker in MARKERS):
        raise UserError(f"{folder} holds neither {' nor '.join(MARKERS)}: export a run first")
    pickled = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES)
    if pickled:
        raise UserError(f"{folder}: {', '.join(pickled)} may run code when loaded; an export holds safetensors only")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=message).commit_url
    except HFValidationError as error:
        raise UserError(f"--repo_id {repo_id}: {error}") from None
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{repo_id} was not uploaded: {reason}") from None
