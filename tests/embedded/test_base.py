"""The embedded base: its tokenizer, its stream of items, a short training with resume, and the checkpoint in git."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from router_tuning.checkpoint.loading import load_dense
from router_tuning.embedded.base_training import SampleStream, build_tokenizer
from router_tuning.embedded.muon import MuonWithAdamW
from router_tuning.embedded.sample_tasks import heldout_text
from router_tuning.evaluation.records import read_records
from router_tuning.evaluation.tasks import evaluate
from router_tuning.places import ROOT
from router_tuning.tuning.encoding import load_tokenizer

BASE = ROOT / "ckpt" / "tiny-llama-mod"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_the_tokenizer_takes_any_text_and_adds_nothing(tokenizer):
    assert len(tokenizer) <= 512 and tokenizer.pad_token_id == 0
    for text in ("QWERTYUIOP", "1234567890"):
        assert tokenizer.tokenize("Input: " + text)[-10:] == list(text), "capitals and digits are single tokens"
    for text in ("plain words", "Grüße, 世界 🙂\n\ttabs  and spaces ", "x = [1, 2]\n    return x_1"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_stream_follows_its_curriculum(tokenizer):
    stages = ((0, {"copy": 1.0}), (10, {"sort": 1.0, "copy": 0.0}))
    rows = itertools.islice(SampleStream(tokenizer, stages, 4, seed=0, window=5), 80)
    asked = [tokenizer.decode(row["input_ids"]).splitlines()[1] for row in rows]
    assert not any("ort" in text for text in asked[:40])
    assert set(asked[40:]) == {"Sort the letters.", "Put the letters in order."}


def test_muon_steps_each_expert_of_a_tensor_as_a_matrix_of_its_own():
    stacked, embedding = (torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 8, 4), (9, 4)))
    alone = [torch.nn.Parameter(part.clone()) for part in stacked.detach()]
    matrices, before = [(f"w{number}", part) for number, part in enumerate(alone)], embedding.detach().clone()
    for some in ([("experts", stacked)], matrices):
        optimizer, generator = MuonWithAdamW([*some, ("embed", embedding)], 1e-2, 1e-3), torch.manual_seed(1)
        for _ in range(3):
            for parameter in (stacked, embedding, *alone):
                parameter.grad = None
            tensor = stacked if len(some) == 1 else torch.stack(alone)
            ((tensor * torch.randn(3, 8, 4, generator=generator)).square().sum() + embedding.sum()).backward()
            optimizer.step()
    assert torch.stack(alone).equal(stacked) and not embedding.equal(before)


@pytest.fixture
def train(command, tmp_path):
    """Train into ``tmp_path`` by the command; its exit code."""
    folders = ["--output_dir", tmp_path / "out" / "tiny", "--work_dir", tmp_path / "work"]
    return lambda *more: command("checkpoint/train_tiny_base.py", *folders, "--batch_size", 4, *more)


EXPERTS = pytest.param(("--num_experts", "3", "--curriculum_at", "2"), marks=pytest.mark.full)


@pytest.mark.parametrize("experts", [(), EXPERTS], ids=["dense", "experts"])
def test_training_resumes_to_the_same_weights_and_writes_a_whole_folder(tmp_path, train, experts):
    options = ("--max_steps", "4", "--save_steps", "2", *experts)
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
        committed = json.loads((BASE / "config.json").read_text())
        routing = {key: value for key, value in committed.items() if key.startswith("mod_")}
        assert fields["model_type"] == "llama" and {key: fields[key] for key in routing} == routing
    saved = json.loads((out / "tokenizer.json").read_text())
    assert saved["truncation"] is saved["padding"] is None


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--max_steps", "0", "0 must be a whole number, at least 1"), ("--num_experts", "1", "at least 2, not 1")],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, train, flag, value, message, capsys):
    assert train(flag, value) == 2
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


def test_checkpoint_in_git_answers_as_its_card_says(tmp_path):
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
