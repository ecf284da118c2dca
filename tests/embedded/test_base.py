"""The embedded base: its tokenizer, its stream of items, a short training with resume, and the checkpoint in git."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from router_tuning.checkpoint.loading import load_dense
from router_tuning.embedded.base_checkpoint import ROUTING_FIELDS
from router_tuning.embedded.base_training import CURRICULUM, SampleStream, build_tokenizer, tiny_config
from router_tuning.embedded.muon import MuonWithAdamW
from router_tuning.embedded.sample_tasks import heldout_text
from router_tuning.evaluation.records import read_records
from router_tuning.evaluation.tasks import evaluate
from router_tuning.tuning.encoding import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "ckpt" / "tiny-llama-mod"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_capitals_and_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast):
    assert len(tokenizer) <= 512 and tokenizer.pad_token_id == 0
    for text in ("QWERTYUIOP", "1234567890"):
        assert tokenizer.tokenize(text) == list(text)
        assert tokenizer.tokenize("Input: " + text)[-10:] == list(text)


@pytest.mark.parametrize("text", ["plain words", "Grüße, 世界 🙂\n\ttabs  and spaces ", "x = [1, 2]\n    return x_1"])
def test_tokenizer_round_trips_any_text_and_adds_nothing(tokenizer: PreTrainedTokenizerFast, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def take(stream: SampleStream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


def test_stream_is_seeded_resumable_and_weighted(tokenizer: PreTrainedTokenizerFast):
    rows = take(SampleStream(tokenizer, CURRICULUM, 4, seed=3, window=5), 80)
    assert rows == take(SampleStream(tokenizer, CURRICULUM, 4, seed=3, window=5), 80)
    assert rows != take(SampleStream(tokenizer, CURRICULUM, 4, seed=4, window=5), 80)
    assert rows[28:] == take(SampleStream(tokenizer, CURRICULUM, 4, seed=3, window=5, start=7), 52)
    stages = ((0, {"copy": 1.0}), (10, {"sort": 1.0, "copy": 0.0}))
    early, late = (take(SampleStream(tokenizer, stages, 4, seed=0, start=start, window=5), 40) for start in (0, 10))
    assert not any("Sort" in tokenizer.decode(row["input_ids"]) for row in early)
    asked = {tokenizer.decode(row["input_ids"]).splitlines()[1] for row in late}
    assert asked == {"Sort the letters.", "Put the letters in order."}


def test_muon_takes_the_matrices_and_its_state_survives():
    def build() -> tuple[LlamaForCausalLM, MuonWithAdamW]:
        torch.manual_seed(0)
        config = tiny_config(32)
        config.num_hidden_layers, config.layer_types = 1, None
        model = LlamaForCausalLM(config)
        return model, MuonWithAdamW(model.named_parameters(), lr=1e-2, adamw_lr=1e-3)

    def step(model: LlamaForCausalLM, optimizer: MuonWithAdamW, seed: int) -> None:
        ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build()
    assert {parameter.shape for parameter in optimizer.parts[0].param_groups[0]["params"]} == {
        torch.Size(shape) for shape in ((128, 128), (64, 128), (384, 128), (128, 384))
    }
    start = [parameter.detach().clone() for parameter in model.parameters()]
    step(model, optimizer, 0)
    assert all(not before.equal(after) for before, after in zip(start, model.parameters(), strict=True))
    again, other = build()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in (*other.param_groups, *optimizer.param_groups):
        group["lr"] = 5e-4
    step(model, optimizer, 1)
    step(again, other, 1)
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_experts_in_one_tensor_step_like_a_matrix_each():
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(3, 8, 4))
    alone = [torch.nn.Parameter(part.clone()) for part in stacked.detach()]
    norms = [("norm", torch.nn.Parameter(torch.ones(2)))]
    whole = MuonWithAdamW([("experts.gate_up_proj", stacked), *norms], lr=1e-2, adamw_lr=1e-3)
    apart = MuonWithAdamW([*((f"w{n}", part) for n, part in enumerate(alone)), *norms], lr=1e-2, adamw_lr=1e-3)
    for _ in range(3):
        aim = torch.randn(3, 8, 4)
        (stacked * aim).square().sum().backward()
        torch.stack([(part * to).square().sum() for part, to in zip(alone, aim, strict=True)]).sum().backward()
        for optimizer in (whole, apart):
            optimizer.step()
            optimizer.zero_grad()
    assert stacked.grad is None and torch.stack(list(alone)).equal(stacked)


@pytest.fixture
def train(command, tmp_path: Path):
    """Train into ``tmp_path`` by the command; its exit code."""
    folders = ["--output_dir", tmp_path / "out" / "tiny", "--work_dir", tmp_path / "work"]
    return lambda *more: command("checkpoint/train_tiny_base.py", *folders, "--batch_size", 4, *more)


EXPERTS = ("--num_experts", "3", "--experts_per_token", "2", "--curriculum_at", "2")


@pytest.mark.parametrize("experts", [(), EXPERTS], ids=["dense", "experts"])
def test_training_resumes_to_the_same_weights_and_writes_a_whole_folder(tmp_path: Path, train, experts: tuple):
    options = ("--max_steps", "4", "--save_steps", "2", "--decay_share", "0.5", *experts)
    assert train(*options) == 0
    out = tmp_path / "out" / "tiny"
    weights = load_file(out / "model.safetensors")
    shutil.rmtree(tmp_path / "work" / "checkpoint-4")
    assert train(*options) == 0
    resumed = load_file(out / "model.safetensors")
    assert all(value.equal(resumed[name]) for name, value in weights.items())
    assert not any("mod_router" in name for name in weights)
    config, fields = load_dense(out).config, json.loads((out / "config.json").read_text())
    if experts:
        assert config.model_type == "mixtral" and not config.output_router_logits
        assert config.num_local_experts == 3 and config.num_experts_per_tok == 2
        assert not any(key.startswith("mod_") for key in fields)
    else:
        assert fields["model_type"] == "llama" and {key: fields[key] for key in ROUTING_FIELDS} == ROUTING_FIELDS
    saved = json.loads((out / "tokenizer.json").read_text())
    assert saved["truncation"] is saved["padding"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max_steps", "0"), "--max_steps must be at least 1, not 0"),
        (("--decay_share", "1"), "--decay_share must be in [0, 1), not 1.0"),
        (("--num_experts", "2", "--experts_per_token", "3"), "--experts_per_token 3 must lie in 1 to --num_experts 2"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path, train, more: tuple, message: str, capsys):
    assert train(*more) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_checkpoint_in_git_is_small_plain_and_whole():
    model, tokenizer = load_dense(BASE), load_tokenizer(BASE)
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 12 * 2**20
    assert not any("router" in name for name in load_file(BASE / "model.safetensors"))
    assert model.config.num_hidden_layers >= 12 and 2e6 < model.num_parameters() < 6e6
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert len(tokenizer) == model.config.vocab_size and tokenizer.tokenize("AL90") == ["A", "L", "9", "0"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token, tokenizer.eos_token) == (0, "<s>", "</s>")
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())


def test_checkpoint_in_git_answers_as_its_card_says(tmp_path: Path):
    """The first held-out items of some tasks; another processor may round another way."""
    (record,) = read_records(ROOT / "figures" / "base.jsonl")
    claimed = {name: task for name, task in record["tasks"].items() if name.endswith("_gen")}
    shares = [task["value"] for task in claimed.values()]
    assert sum(shares) / len(shares) >= 0.85 and 2 * sum(share >= 0.95 for share in shares) >= len(shares)
    for task in ("copy", "lookup"):
        (tmp_path / f"{task}.jsonl").write_text(heldout_text(task, 24, first_seed=1_000_000))
    tasks, where = ["mod_copy_gen", "mod_lookup_gen"], {"heldout_dir": str(tmp_path)}
    found = evaluate(load_dense(BASE), load_tokenizer(BASE), tasks, metadata=where)["tasks"]
    for task in tasks:
        pairs = zip(found[task]["documents"], claimed[task]["documents"], strict=False)
        assert sum(ours != theirs for ours, theirs in pairs) <= 1, task
