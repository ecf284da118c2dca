"""Bringing a base into a folder, known or new: checks before changes, one clear line on bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from refused import refused
from tiny_checkpoint import tiny_logits, write_base
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from router_tuning.bases import preparing as module
from router_tuning.bases.preparing import RECORD, prepare_base
from router_tuning.bases.shards import INDEX, weight_map
from router_tuning.embedded.base_training import build_tokenizer
from router_tuning.errors import UserError
from router_tuning.model import is_routed

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(vocab_size=300, samples_per_task=2)


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A local checkpoint in several shards."""
    folder = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size="8KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1 and (folder / INDEX).is_file()
    return folder


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    """A config-only folder that the base fits."""
    folder = tmp_path / "ckpt" / "tiny-mod"
    folder.mkdir(parents=True)
    write_variant(folder)
    return folder


def write_variant(folder: Path, **changes: object) -> None:
    fields = {"model_type": "llama_mod", "architectures": ["LlamaModForCausalLM"], "mod_layers": [1], **SIZES}
    (folder / "config.json").write_text(json.dumps({**fields, "mod_base": "someone/tiny", **changes}))


def content(folder: Path) -> dict[str, object]:
    return {path.name: path.readlink() if path.is_symlink() else path.read_bytes() for path in folder.iterdir()}


def test_weights_are_linked_small_files_copied_and_both_load(base: Path, variant: Path):
    config, before = (variant / "config.json").read_text(), content(base)
    source, files = prepare_base(variant, str(base))
    shards = {path.name for path in base.glob("*.safetensors")}
    assert source == str(base)
    assert shards | {INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(files)
    assert {path.name for path in variant.iterdir() if path.is_symlink()} == shards
    assert (variant / "config.json").read_text() == config
    loaded = LlamaForCausalLM.from_pretrained(variant, config=LlamaConfig(**SIZES)).state_dict()
    original = LlamaForCausalLM.from_pretrained(base).state_dict()
    assert all(value.equal(original[name]) for name, value in loaded.items())
    tokenizer = AutoTokenizer.from_pretrained(variant)
    tokenizer.add_special_tokens({"pad_token": "<mine>"})
    tokenizer.save_pretrained(variant)
    assert content(base) == before
    prepare_base(variant, str(base))
    tokenizers = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (base, variant)]
    assert tokenizers[0] == tokenizers[1], "a second call brings them back"


def test_another_base_replaces_the_first_and_leaves_no_stale_shard_or_link(base: Path, variant: Path, tmp_path: Path):
    prepare_base(variant, str(base))
    moved = base.rename(tmp_path / "moved")
    with refused(r"links to .*base.*, which is gone", UserError):
        weight_map(variant)
    single = tmp_path / "single"
    LlamaForCausalLM.from_pretrained(moved).save_pretrained(single)
    AutoTokenizer.from_pretrained(moved).save_pretrained(single)
    prepare_base(variant, str(single))
    assert [path.name for path in variant.glob("*.safetensors")] == ["model.safetensors"]
    assert not (variant / INDEX).exists()
    assert all(path.stat().st_mode & 0o044 for path in variant.iterdir() if not path.is_symlink())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_new_name_gets_a_configuration_with_half_of_the_layers_routed(tmp_path: Path, family: str):
    source = write_base(tmp_path / "source", family)
    folder = tmp_path / "ckpt" / "mine"
    prepare_base(folder, str(source))
    fields = json.loads((folder / "config.json").read_text())
    assert fields["mod_layers"] == [2, 3] and fields["model_type"] == family and "mod_base" not in fields
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert is_routed(model) and fields["architectures"] == [type(model).__name__.replace("Mod", "")]
    dense = tiny_logits(AutoModelForCausalLM.from_pretrained(source))
    torch.testing.assert_close(tiny_logits(model), dense, atol=1e-5, rtol=0)


def test_a_gguf_file_is_converted_into_the_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    tiny_gguf = pytest.importorskip("tiny_gguf", reason="needs the package gguf")
    file = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", tiny_model(vocab_size=len(tokenizer)), tokenizer)
    folder = tmp_path / "ckpt" / "mine"
    prepare_base(folder, str(file))
    assert json.loads((folder / RECORD).read_text())["resolved"] == str(file)
    before = content(folder)
    file.write_bytes(b"GGUF")
    for place in (folder, tmp_path / "ckpt" / "other"):
        with refused("cannot be read as a GGUF model", UserError):
            prepare_base(place, str(file))
    assert content(folder) == before and [path.name for path in (tmp_path / "ckpt").iterdir()] == ["mine"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert is_routed(model) and model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


def test_hub_download_is_linked_from_the_cache(base: Path, variant: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fake(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision))
        assert not any("bin" in pattern or pattern in ("*", "consolidated*") for pattern in allow_patterns)
        return str(base)

    monkeypatch.setattr(module, "snapshot_download", fake)
    prepare_base(variant)
    assert calls == [("someone/tiny", None)]
    assert json.loads((variant / RECORD).read_text())["source"] == "someone/tiny"
    prepare_base(variant.with_name("mine"), "other/tiny", revision="v2")
    assert calls[1] == ("other/tiny", "v2")
    assert json.loads((variant.with_name("mine") / "config.json").read_text())["mod_base"] == "other/tiny"


def index_of(base: Path, **changes: str | None) -> None:
    """Change the weight index of the base: other files, or none, for some tensors."""
    index = json.loads((base / INDEX).read_text())["weight_map"] | changes
    (base / INDEX).write_text(json.dumps({"weight_map": {key: name for key, name in index.items() if name}}))


def shard(base: Path) -> Path:
    return min(base.glob("*.safetensors"))


def only_a_pickle(base: Path) -> None:
    for path in [*base.glob("*.safetensors"), base / INDEX]:
        path.unlink()
    (base / "pytorch_model.bin").touch()


ROPE = {"rope_type": "default", "rope_theta": 5e5}
SPOILT = [
    (lambda base, _: shard(base).unlink(), r"model-.* is missing"),
    (lambda base, _: shard(base).write_bytes(shard(base).read_bytes()[:-4]), "is no whole safetensors file"),
    (lambda base, _: index_of(base, **{"lm_head.weight": None}), "1 of .* tensors are missing, the first is lm_head"),
    (lambda base, _: only_a_pickle(base), "pytorch_model.bin is a pickle"),
    (lambda base, _: index_of(base, **{"lm_head.weight": "../x.safetensors"}), "no safetensors file of this folder"),
    (lambda base, _: (base / INDEX).write_text("{"), "no weight index"),
    (lambda base, _: (base / "tokenizer.json").unlink(), "holds no tokenizer"),
    (lambda base, _: (base / "config.json").unlink(), "config.json: no such file"),
    (lambda _, variant: write_variant(variant, hidden_size=32), "hidden_size is 16, not 32"),
    (
        lambda _, variant: write_variant(variant, num_hidden_layers=4, vocab_size=65),
        "vocab_size is 64, not 65; num_hidden_layers is 3, not 4",
    ),
    (lambda _, variant: write_variant(variant, rope_parameters=ROPE), "rope_parameters is"),
    (lambda _, variant: write_variant(variant, model_type="mistral_mod"), "is a llama model, .* needs a mistral"),
    (lambda _, variant: write_variant(variant, model_type="unheard_of"), "no causal language model of type 'unheard"),
    (lambda _, variant: (variant / "model.safetensors").write_bytes(b"mine"), "was not brought by this command"),
    (lambda _, variant: (variant / "config.json").rename(variant / "dear.txt"), "choose another name"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_what_does_not_fit_is_refused_and_nothing_touched(base: Path, variant: Path, spoil, message: str):
    spoil(base, variant)
    before = content(base), content(variant)
    with refused(message, UserError):
        prepare_base(variant, str(base))
    assert (content(base), content(variant)) == before and os.listdir(variant.parent) == [variant.name]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        *[
            (name, "no folder, no .gguf file, and no hub id")
            for name in ("/none", "./none", "none", "models/none.gguf")
        ],
        (None, "someone/tiny did not come from the hub: no route"),
    ],
)
def test_source_that_is_nothing(variant: Path, source: str | None, message: str, monkeypatch: pytest.MonkeyPatch):
    def fake(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(module, "snapshot_download", fake)
    with refused(message, UserError):
        prepare_base(variant, source)
    assert os.listdir(variant) == ["config.json"]


def test_command_line(base: Path, variant: Path, command, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(variant)
    given = ["--ckpt_root", variant.parent, "--folder_name"]
    assert command("checkpoint/prepare_base.py", *given, variant.name, "--source", base) == 0
    assert "holds the base of" in capsys.readouterr().out
    for name, message in (("tinny-mod", "tinny-mod is a new name"), ("../mine", "cannot name a folder")):
        assert command("checkpoint/prepare_base.py", *given, name) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
