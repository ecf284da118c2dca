"""push_to_hub against a hub on this machine: every file arrives, shards included; refusals are one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub

from router_tuning.checkpoint import exporting as exports
from router_tuning.checkpoint.card import model_card
from router_tuning.checkpoint.hub import push_export, uploaded_files
from router_tuning.errors import UserError


def upload(folder, repo_id, endpoint):
    keep = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    env = keep | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
    env["HF_ENDPOINT"] = endpoint
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "support" / "hub_upload.py"),
        str(folder),
        repo_id,
        endpoint,
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=150)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def export(tmp_path_factory, run, base):
    folder = tmp_path_factory.mktemp("hub") / "full"
    exports.export(run, base, folder)
    return folder


def test_every_file_arrives(export):
    with FakeHub() as hub:
        printed = upload(export, "me/tiny", hub.endpoint)
        assert printed == f"{hub.endpoint}/me/tiny/commit/{'1' * 40}", printed
        assert hub.repos == {"me/tiny": True} and hub.tokens == {"Bearer hf_test"}
        expected = {path.name: path.read_bytes() for path in export.iterdir()}
        assert {name: hub.files[name] for name in expected} == expected


def test_refusal_of_the_hub_is_one_line(export):
    with FakeHub(refuse=403) as hub:
        printed = upload(export, "me/tiny", hub.endpoint)
    assert printed.startswith("error: me/tiny was not uploaded:") and "403" in printed and "\n" not in printed


def test_strangers_and_pickles_stay_here(tmp_path, export):
    with pytest.raises(UserError, match="export a run first"):
        push_export(tmp_path, "me/tiny")
    (tmp_path / "router_config.json").write_text("{}")
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"weights\.pt may run code"):
        push_export(tmp_path, "me/tiny")
    with pytest.raises(UserError, match="--repo_id a/b/c"):
        push_export(export, "a/b/c")


def test_what_would_be_uploaded_is_checked_without_a_hub(tmp_path, run, base, root):
    for form in ("full", "adapter"):
        exports.export(run, base, tmp_path / form, form, model_card(run, form))
        expected = {path.name: path.stat().st_size for path in (tmp_path / form).iterdir()}
        assert uploaded_files(tmp_path / form, "me/tiny") == expected
    command = [
        sys.executable,
        str(root / "entrypoints/checkpoint/push_to_hub.py"),
        "--dry_run",
        "--repo_id",
        "me/tiny",
    ]
    done = subprocess.run([*command, "--folder", str(tmp_path / "full")], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and "model.safetensors.index.json" in done.stdout, done.stderr
    (tmp_path / "full" / "README.md").write_text("---\ntags: [one\n---\n")
    with pytest.raises(UserError, match=r"README\.md is no model card"):
        uploaded_files(tmp_path / "full", "me/tiny")
    (tmp_path / "adapter" / "more.safetensors").symlink_to(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match="which is gone"):
        uploaded_files(tmp_path / "adapter", "me/tiny")
