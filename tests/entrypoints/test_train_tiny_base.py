"""The embedded base: its tokenizer, its stream of items, a short training with resume, and the checkpoint in git."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from router_tuning.embedded.base_checkpoint import ROUTING_FIELDS, read_checkpoint, write_card
from router_tuning.embedded.base_scoring import exact_match, generate_answers, text_perplexity
from router_tuning.embedded.base_training import CURRICULUM, SampleStream, build_tokenizer, collate, tiny_config
from router_tuning.embedded.muon import MuonWithAdamW
from router_tuning.embedded.sample_files import distinct_items
from router_tuning.embedded.sample_tasks import TASKS
from router_tuning.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "entrypoints" / "checkpoint" / "train_tiny_base.py"
BASE = ROOT / "ckpt" / "tiny-llama-mod"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def base() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return read_checkpoint(BASE)


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


def test_stream_rows_end_with_the_answer(tokenizer: PreTrainedTokenizerFast):
    plain = 0
    for row in take(SampleStream(tokenizer, ((0, dict.fromkeys(TASKS, 1.0)),), 16, seed=0), 256):
        assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id
        if row["input_ids"][0] == tokenizer.bos_token_id:
            plain += 1
            assert row["labels"][1:] == row["input_ids"][1:]
    assert plain


def test_collate_pads_right_and_hides_the_padding():
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


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
    for group in other.param_groups:
        group["lr"] = 5e-4
    for group in optimizer.param_groups:
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


def arguments(folder: Path, *more: str) -> list[str]:
    folders = ["--output_dir", str(folder / "out" / "tiny"), "--work_dir", str(folder / "work")]
    return [*folders, "--batch_size", "4", "--eval_items", "1", *more]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Call the entrypoint's ``main`` in this process."""
    spec = importlib.util.spec_from_file_location("train_tiny_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(folder: Path, *more: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments(folder, *more)])
        module.main()

    return call


def test_training_resumes_to_the_same_weights_and_writes_a_whole_folder(tmp_path: Path, run):
    run(tmp_path, "--max_steps", "4", "--save_steps", "2", "--decay_share", "0.5")
    out = tmp_path / "out" / "tiny"
    weights = load_file(out / "model.safetensors")
    assert not any("router" in name for name in weights) and len(weights) == 12 * 9 + 2
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama_mod" and {key: config[key] for key in ROUTING_FIELDS} == ROUTING_FIELDS
    assert "average of" in (out / "README.md").read_text()
    assert set(json.loads((out / "eval_results.json").read_text())["exact_match"]) == {*TASKS, "average"} - {"story"}
    shutil.rmtree(tmp_path / "work" / "checkpoint-4")
    run(tmp_path, "--max_steps", "4", "--save_steps", "2", "--decay_share", "0.5")
    resumed = load_file(out / "model.safetensors")
    assert all(value.equal(resumed[name]) for name, value in weights.items())


def test_a_mixture_of_experts_trains_resumes_and_reads_back(tmp_path: Path, run):
    experts = ("--num_experts", "3", "--experts_per_token", "2", "--curriculum_at", "2", "--eval_items", "3")
    run(tmp_path, "--max_steps", "4", "--save_steps", "2", "--decay_share", "0.5", *experts)
    out = tmp_path / "out" / "tiny"
    weights = load_file(out / "model.safetensors")
    shutil.rmtree(tmp_path / "work" / "checkpoint-4")
    run(tmp_path, "--max_steps", "4", "--save_steps", "2", "--decay_share", "0.5", *experts)
    resumed = load_file(out / "model.safetensors")
    assert all(value.equal(resumed[name]) for name, value in weights.items())
    model, _ = read_checkpoint(out)
    assert model.config.model_type == "mixtral" and not model.config.output_router_logits
    assert model.config.num_local_experts == 3 and model.config.num_experts_per_tok == 2
    assert not any(key.startswith("mod_") for key in model.config.to_dict())


def test_two_processes_split_each_batch(tmp_path: Path, run):
    """World size 2 sees the same batches as world size 1, half on each process: the same weights up to rounding."""
    steps = ("--max_steps", "3", "--decay_share", "0")
    run(tmp_path / "one", *steps)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, SCRIPT, *arguments(tmp_path / "two", *steps)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / name / "out/tiny/model.safetensors") for name in ("one", "two"))
    torch.manual_seed(0)
    start = LlamaForCausalLM(tiny_config(512)).state_dict()
    for name, value in first.items():
        moved = (value - start[name]).norm()
        assert moved > 0 and (value - second[name]).norm() < 0.2 * moved, name
    record = json.loads((tmp_path / "two/out/tiny/training_log.json").read_text())
    assert record["arguments"]["world_size"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max_steps", "0"), "--max_steps must be at least 1, not 0"),
        (("--decay_share", "1"), "--decay_share must be in [0, 1), not 1.0"),
        (("--eval_only",), "no model.safetensors in"),
        (("--num_experts", "2", "--experts_per_token", "3"), "--experts_per_token 3 must lie in 1 to --num_experts 2"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path, run, more: tuple[str, ...], message: str):
    with pytest.raises(UserError) as caught:
        run(tmp_path, *more)
    assert message in str(caught.value) and list(tmp_path.iterdir()) == []


def test_card_keeps_what_a_person_wrote(tmp_path: Path):
    scores = {"exact_match": {"copy": 1.0, "add": 0.5, "average": 0.75}, "perplexity": {"story": 2.0}}
    write_card(tmp_path, scores, 8)
    text = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(f"Before.\n{text}After.\n")
    scores["exact_match"] |= {"add": 1.0, "average": 1.0}
    write_card(tmp_path, scores, 8)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n") and text.count("| add |") == 1
    assert "| add | 1.000 |" in text and "2 of 2 tasks reach 0.95." in text


def test_checkpoint_in_git_is_small_plain_and_whole(base):
    model, tokenizer = base
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 12 * 2**20
    assert not any("router" in name for name in load_file(BASE / "model.safetensors"))
    assert model.config.num_hidden_layers >= 12 and 2e6 < model.num_parameters() < 6e6
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.tokenize("AL90") == ["A", "L", "9", "0"]
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())


def test_checkpoint_in_git_answers_as_its_card_says(base):
    """A sample of held-out items per task; the tolerance is five standard errors of the sample."""
    model, tokenizer = base
    claimed = json.loads((BASE / "eval_results.json").read_text())
    shares = claimed["exact_match"]
    assert shares["average"] >= 0.85 and 2 * sum(share >= 0.95 for share in shares.values()) >= len(shares)
    for task in ("copy", "lookup", "fact", "add"):
        measured = exact_match(model, tokenizer, distinct_items(task, "heldout", 32))
        allowed = 5 * math.sqrt(max(shares[task] * (1 - shares[task]), 0.01) / 32)
        assert abs(measured - shares[task]) <= allowed, task
    stories = [item.answer for item in distinct_items("story", "heldout", 8)]
    assert text_perplexity(model, tokenizer, stories) == pytest.approx(claimed["perplexity"]["story"], rel=0.1)


def test_answers_do_not_depend_on_the_batch(base):
    model, tokenizer = base
    items = distinct_items("dialogue", "heldout", 3) + distinct_items("copy", "heldout", 3)
    together = generate_answers(model, tokenizer, items, batch_size=6)
    assert together == generate_answers(model, tokenizer, items, batch_size=1)


def test_missing_weights_name_the_command(tmp_path: Path):
    with pytest.raises(UserError, match="train it with entrypoints/checkpoint/train_tiny_base.py"):
        read_checkpoint(tmp_path)


def test_tokenizer_files_load_as_the_tokenizer(base):
    loaded = AutoTokenizer.from_pretrained(BASE)
    assert (loaded.pad_token_id, loaded.bos_token, loaded.eos_token) == (0, "<s>", "</s>")
    assert loaded.chat_template == base[1].chat_template
    saved = json.loads((BASE / "tokenizer.json").read_text())
    assert saved["truncation"] is saved["padding"] is None
