"""An export is checked before it is uploaded, in one commit; refusals are one line."""

from types import SimpleNamespace

import pytest

from router_tuning.checkpoint import exporting
from router_tuning.checkpoint.card import model_card


@pytest.fixture(scope="module")
def export(tmp_path_factory, run, base):
    folder = tmp_path_factory.mktemp("hub") / "full"
    exporting.export(run, base, folder, "full", model_card(run, "full"))
    return folder


@pytest.fixture
def push(command, monkeypatch, capsys):
    """``push(*arguments)`` → exit code, what was printed, calls of the hub."""
    calls = []

    def refusing(repo_id, **options):
        if repo_id == "me/forbidden":
            raise OSError("403 Client Error\nnot yours")
        calls.append((repo_id, options))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, *args, **options: refusing(*args, **options))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda _, **options: refusing(**options))

    def run(*arguments):
        code = command("checkpoint/push_to_hub.py", *arguments)
        return code, "".join(capsys.readouterr()), calls

    return run


def test_everything_is_uploaded_in_one_commit_unless_it_is_a_trial(push, export):
    code, said, calls = push("--folder", export, "--repo_id", "me/tiny", "--dry_run")
    assert code == 0 and not calls and "private if new" in said
    assert all(path.name in said and f"{path.stat().st_size:,}" in said for path in export.iterdir())
    code, said, calls = push("--folder", export, "--repo_id", "me/tiny")
    assert code == 0 and said.strip() == "https://hub/me/tiny/commit/1"
    created, uploaded = calls
    assert created[1]["private"] is True and uploaded[1]["folder_path"] == str(export)


@pytest.mark.parametrize(
    ("spoil", "repo_id", "said"),
    [
        (lambda folder: (folder / "router_config.json").unlink(), "me/tiny", "export a run first"),
        (lambda folder: (folder / "weights.pt").touch(), "me/tiny", "weights.pt may run code"),
        (lambda folder: (folder / "more.safetensors").symlink_to("gone"), "me/tiny", "which is gone"),
        (lambda folder: (folder / "README.md").write_text("---\ntags: [one\n---\n"), "me/tiny", "while parsing"),
        (lambda folder: None, "a/b/c", "a/b/c"),
        (lambda folder: None, "me/forbidden", "was not uploaded: 403 Client Error not yours"),
    ],
)
def test_refusals_are_one_line(push, tmp_path, spoil, repo_id, said):
    (tmp_path / "router_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\ntags: [one]\n---\n")
    spoil(tmp_path)
    code, printed, calls = push("--folder", tmp_path, "--repo_id", repo_id)
    assert code == 2 and said in printed and len(printed.strip().splitlines()) == 1 and not calls
