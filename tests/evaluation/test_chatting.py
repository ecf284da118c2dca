"""The chat: answers are those of generate, capacity and commands are real, mistakes do not end the talk."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_checkpoint import write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.model import load_routers, record_routing
from router_tuning.viewer.chatting import Answer, answer, prompt_of

TALK = [{"role": "user", "content": "Add 3 and 9."}]


@pytest.fixture(scope="module")
def model(base, run):
    return load_routers(AutoModelForCausalLM.from_pretrained(base), run).eval()


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@torch.no_grad()
def test_answer_is_that_of_generate(model, tokenizer):
    found = answer(model, tokenizer, TALK, max_new_tokens=5, compare=True)
    ids = tokenizer("<|user|>\nAdd 3 and 9.\n<|assistant|>\n", return_tensors="pt")["input_ids"]
    with record_routing(model) as log:
        output = model.generate(ids, do_sample=False, max_new_tokens=5)
    assert found.text == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    expected = {f"{layer}.attn": share for layer, share in log.capacity().items() if layer != "total"}
    assert found.capacity == {**expected, "total": log.capacity()["total"]}
    assert found.tokens == output.shape[1] - ids.shape[1] and found.seconds > 0 and found.seconds_dense > 0


def test_prompt_without_a_chat_template_is_that_of_training(tokenizer):
    with_template = prompt_of(TALK, tokenizer)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert prompt_of(TALK, tokenizer) == with_template == "<|user|>\nAdd 3 and 9.\n<|assistant|>\n"
    finally:
        tokenizer.chat_template = template


def test_a_conversation_without_room_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="512"):
        answer(model, tokenizer, [{"role": "user", "content": "A1 " * 300}])


def test_summary_line():
    found = Answer("x", 4, {"1.attn": 0.0, "2.attn": 1.0, "total": 0.5}, seconds=0.5, seconds_dense=1.0)
    assert found.summary() == "▁█ capacity 0.50, 4 tokens in 0.50 s, dense 1.00 s: +50% of the time saved"


def test_terminal_session(tmp_path, base, root):
    run = write_run(tmp_path / "run", base)
    config = json.loads((run / "router_config.json").read_text())
    logits = {f"{layer}.attn": [9.0, -9.0] for layer in (1, 2, 3)}
    config["dial"] = {"capacity": [0.0, 1.0], "logit": logits}
    (run / "router_config.json").write_text(json.dumps(config))
    typed = "Add 3 and 9.\n/capacity 1\nAgain.\n/capacity x\n/capacity 7\n/reset\n\n/what\n/quit\nnever\n"
    command = [sys.executable, str(root / "entrypoints/demo/chat.py"), "--run", str(run), "--base", str(base)]
    done = subprocess.run(
        [*command, "--max_new_tokens", "4", "--compare"], input=typed, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for part in ("dial at 1", "capacity 1.00", "a number from 0 to 1", "must lie in [0, 1]", "new conversation"):
        assert part in done.stdout, done.stdout
    assert done.stdout.count("tokens in") == 2 and done.stdout.count("of the time saved") == 2
