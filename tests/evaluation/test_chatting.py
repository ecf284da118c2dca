"""The chat: answers are those of generate, capacity and commands are real, mistakes do not end the talk."""

import io

import pytest
import torch
from refused import refused
from tiny_checkpoint import write_dial, write_run
from transformers import AutoTokenizer

from router_tuning.errors import UserError
from router_tuning.model import record_routing
from router_tuning.model.flops import flops_share
from router_tuning.viewer.chatting import answer

TALK = [{"role": "user", "content": "Add 3 and 9."}]


@torch.no_grad()
def test_answer_is_that_of_generate(routed, tokenizer):
    model = routed
    found = answer(model, tokenizer, TALK, max_new_tokens=5, compare=True)
    ids = tokenizer("<|user|>\nAdd 3 and 9.\n<|assistant|>\n", return_tensors="pt")["input_ids"]
    with record_routing(model) as log:
        output = model.generate(ids, do_sample=False, max_new_tokens=5)
    assert found.text == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    expected = {f"{layer}.attn": share for layer, share in log.capacity().items() if layer != "total"}
    assert found.capacity == pytest.approx(expected, abs=1e-4)
    assert found.share == pytest.approx(flops_share(model, found.capacity), abs=1e-3)
    assert found.tokens == output.shape[1] - ids.shape[1] and found.seconds > 0 and found.seconds_dense > 0


def test_what_cannot_be_answered_is_refused_in_one_line(routed, tokenizer):
    with refused("512", UserError):
        answer(routed, tokenizer, [{"role": "user", "content": "A1 " * 300}])
    with refused("^the chat template refuses this conversation: unknown role tool", UserError):
        answer(routed, tokenizer, [{"role": "tool", "content": "5"}])


def test_terminal_session(tmp_path, base, command, capsys, monkeypatch):
    run = write_dial(write_run(tmp_path / "run", base))
    refusing = "{% if messages | length > 2 %}{{ raise_exception('one turn, please') }}{% endif %}"
    template = AutoTokenizer.from_pretrained(base).chat_template
    (run / "chat_template.jinja").write_text(refusing + template)  # the run's own, not the base's
    typed = "Add 3 and 9.\nMore.\n/reset\n/dial 1\nAgain.\n/dial x\n/dial 7\n/reset\n\n/what\n/quit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert command("demo/chat.py", "--run", run, "--base", base, "--max_new_tokens", "4", "--compare") == 0
    told = capsys.readouterr().out
    wanted = ("dial at 1, on average over text like that it was calibrated on", "depth 100%", "a number from 0 to 1")
    wanted += ("must lie in [0, 1]", "new conversation", "one turn, please")
    assert [part for part in wanted if part not in told] == [], told
    assert told.count("tokens in") == 2 and told.count("of the time saved") == 2
