"""The built wheel holds all that its code needs, and works where nothing of this repository is."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from isolated_environment import IsolatedPython
from tiny_checkpoint import write_base
from tiny_tuning import write_conversations

ROOT = Path(__file__).resolve().parents[1]
INSIDE = {"utils": "router_tuning", "configs": "router_tuning/configs", "entrypoints": "router_tuning/entrypoints"}
"""Folder of the repository → folder of the wheel."""


def pip(python: Path | str, *arguments: str) -> None:
    """Run pip for an environment, without a network."""
    command = [sys.executable, "-m", "pip", "--python", str(python), *arguments]
    subprocess.run([*command, "--quiet", "--no-deps", "--no-index"], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that git knows, or would."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "pyproject.toml", "README.md", *INSIDE]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folder = tmp_path_factory.mktemp("wheel")
    for name in names:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    [built] = folder.glob("*.whl")
    return built


def requirements(*extras: str) -> list[str]:
    """What pyproject.toml asks for, with some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = (line for extra in extras for line in project["optional-dependencies"][extra])
    wanted = [*project["dependencies"], *optional]
    return [line for line in wanted if not line.startswith(project["name"])]


def installed(wheel: Path, folder: Path, *extras: str) -> IsolatedPython:
    """The wheel in an environment that holds what it and some extras require alone."""
    isolated = IsolatedPython(folder, requirements(*extras))
    pip(isolated.python, "install", str(wheel))
    return isolated


def test_every_file_is_in_it(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = [path for folder in INSIDE for path in (wheel.parent / "source" / folder).rglob("*") if path.is_file()]
    parts = [path.relative_to(wheel.parent / "source").parts for path in sources]
    assert inside == {"/".join([INSIDE[folder], *rest]) for folder, *rest in parts}


def test_the_model_package_needs_torch_and_transformers_alone(wheel, tmp_path):
    assert [line.split(">")[0] for line in requirements()] == ["torch", "transformers"]
    code = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from router_tuning.model import record_routing, route, save_routers
config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, vocab_size=9)
model = route(LlamaForCausalLM(config), mod_n=2)
with record_routing(model) as log:
    model(torch.zeros(1, 3, dtype=torch.long))
save_routers(model, "routers")
print(float(log.capacity()["total"]))
"""
    isolated = installed(wheel, tmp_path / "environment")
    assert isolated.run("-c", code, cwd=tmp_path) == "1.0\n" and (tmp_path / "routers/router.safetensors").is_file()


@pytest.mark.full
def test_an_installed_package_tunes_and_shows_from_an_empty_folder(wheel, tmp_path):
    isolated = installed(wheel, tmp_path / "environment", "train", "viewer")
    base, data = write_base(tmp_path / "base"), write_conversations(tmp_path / "words.jsonl")
    (folder := tmp_path / "empty").mkdir()

    def run(command: str, **flags: object) -> str:
        options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        return isolated.run(str(isolated.home / "bin/router-tuning"), command, *options, cwd=folder)

    out = run("finetune_mod", model_name_or_path=base, train_file=data, global_batch_size=8, recipe="budget",
              granularity="attn_token", label_tokens=200, calibration_tokens=200)  # fmt: skip
    tuned = Path(out.splitlines()[-1].removeprefix("output: "))
    assert tuned.is_relative_to(folder / "trained_models" / "base" / "words")
    run("routing_report", run=tuned, prompts=data, per_file=2, max_new_tokens=4, dial_rows=2)
    assert "<title>Routing of base" in (tuned / "routing_report.html").read_text()


@pytest.mark.full
def test_tasks_are_found_where_the_package_is_installed(wheel, tmp_path):
    isolated = installed(wheel, tmp_path / "environment", "train", "eval")
    base = write_base(tmp_path / "base")
    with pytest.raises(subprocess.CalledProcessError) as stopped:
        isolated.run("-m", "router_tuning", "evaluate_mod", "--base", str(base), "--tasks", "none", cwd=tmp_path)
    assert "ours are mod_" in stopped.value.stderr
