"""A ``.gguf`` file becomes an ordinary checkpoint: the same numbers, the same matrices, or one clear line."""

import json
import os
from pathlib import Path

import pytest
import torch
from refused import refused
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.bases import gguf as module
from router_tuning.bases.gguf import convert_gguf
from router_tuning.embedded.base_training import build_tokenizer
from router_tuning.errors import UserError

tiny_gguf = pytest.importorskip("tiny_gguf", reason="needs the package gguf")
REAL = os.environ.get("REAL_GGUF")
"""A folder of real ``.gguf`` files."""


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(vocab_size=320, samples_per_task=2)


def base(tokenizer, family="llama", **options):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-6}
    return tiny_model(family, vocab_size=len(tokenizer), **sizes, **options)


@pytest.mark.parametrize("family", sorted(tiny_gguf.ARCHITECTURES))
@pytest.mark.parametrize("kind, error", [(tiny_gguf.FLOAT, 0.004), (tiny_gguf.EIGHT_BITS, 0.02)])
def test_weights_and_settings_are_those_of_the_model(tmp_path, tokenizer, family, kind, error):
    model = base(tokenizer, family)
    convert_gguf(tiny_gguf.write_gguf(tmp_path / "base.gguf", model, tokenizer, kind), tmp_path / "base")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert found.dtype == torch.bfloat16 and not found.config.tie_word_embeddings
    for name, value in model.state_dict().items():
        there = found.state_dict()[name].float()
        assert float((there - value).norm()) <= error * float(value.norm()), name
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert "quantization_config" not in config and config["rms_norm_eps"] == 1e-6
    assert config["model_type"] == family and config["max_position_embeddings"] == 128
    assert found.generation_config.eos_token_id == tokenizer.eos_token_id
    text = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert text.get_vocab() == tokenizer.get_vocab() and text.chat_template == tokenizer.chat_template
    assert text.eos_token == tokenizer.eos_token and text.decode(text("Hi 12, there.")["input_ids"]) == "Hi 12, there."


@pytest.mark.parametrize("tied", [True, False])
def test_one_matrix_that_was_rounded_in_two_ways_is_one_again(tmp_path, tokenizer, tied):
    model = base(tokenizer)
    if tied:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    options = {"kind": tiny_gguf.EIGHT_BITS, "embedding": tiny_gguf.FOUR_BITS}
    convert_gguf(tiny_gguf.write_gguf(tmp_path / "base.gguf", model, tokenizer, **options), tmp_path / "base")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert found.config.tie_word_embeddings == tied
    output = found.get_output_embeddings().weight
    assert (found.get_input_embeddings().weight is output) == tied
    assert float((output.float() - model.lm_head.weight).norm() / model.lm_head.weight.norm()) < 0.02, "the finer one"


DAMAGE = {
    "header": lambda data: data[: len(data) // 1000],
    "vocabulary": lambda data: data[: len(data) // 30],
    "weights": lambda data: data[: len(data) * 2 // 3],
    "last byte": lambda data: data[:-1],
    "zeros at its end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "another format": lambda data: b"PK\3\4" + data[4:],
    "nothing": lambda data: b"",
    "unknown architecture": lambda data: data.replace(b"llama", b"lamma"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_in_one_line(tmp_path, tokenizer, damage):
    file = tiny_gguf.write_gguf(tmp_path / "base.gguf", base(tokenizer), tokenizer)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with refused(r"base\.gguf", UserError):
        convert_gguf(file, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with refused("pip install gguf", UserError):
        convert_gguf(tmp_path / "base.gguf", tmp_path / "base")


@pytest.mark.skipif(REAL is None, reason="REAL_GGUF names no folder of real .gguf files")
@pytest.mark.parametrize("file", sorted(Path(REAL or ".").glob("*.gguf")), ids=lambda path: path.stem)
def test_real_files(tmp_path, file):
    convert_gguf(file, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = AutoTokenizer.from_pretrained(tmp_path / "base")("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        losses = model(**ids, labels=ids["input_ids"]).loss
    assert model.dtype == torch.bfloat16 and float(losses) < 4
