"""Bringing a base into a folder, known or new: checks before changes, one clear line on bad input."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from refused import refused
from tiny_checkpoint import tiny_logits, write_base
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from router_tuning.bases import preparing
from router_tuning.bases.preparing import RECORD, prepare_base
from router_tuning.bases.shards import INDEX, weight_map
from router_tuning.errors import UserError
from router_tuning.model import is_routed


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("sharded") / "base", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1 and (folder / INDEX).is_file()
    return folder


@pytest.fixture
def base(tmp_path, sharded):
    """A local checkpoint in several shards."""
    return shutil.copytree(sharded, tmp_path / "base")


@pytest.fixture
def variant(tmp_path, base):
    """A config-only folder that the base fits."""
    folder = tmp_path / "ckpt" / "tiny-mod"
    folder.mkdir(parents=True)
    routed = {"model_type": "llama_mod", "architectures": ["LlamaModForCausalLM"], "mod_layers": [1]}
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    change(folder, mod_base="someone/tiny", **routed)
    return folder


def change(folder: Path, **fields: object) -> None:
    """Other values in the config of a folder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def content(folder: Path) -> dict[str, object]:
    return {path.name: path.readlink() if path.is_symlink() else path.read_bytes() for path in folder.iterdir()}


def test_weights_are_linked_small_files_copied_and_both_load(base, variant):
    config, before = (variant / "config.json").read_text(), content(base)
    source, files = prepare_base(variant, str(base))
    shards = {path.name for path in base.glob("*.safetensors")}
    assert source == str(base)
    assert shards | {INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(files)
    assert {path.name for path in variant.iterdir() if path.is_symlink()} == shards
    assert (variant / "config.json").read_text() == config
    original = LlamaForCausalLM.from_pretrained(base)
    loaded = LlamaForCausalLM.from_pretrained(variant, config=original.config)
    assert torch.equal(tiny_logits(loaded), tiny_logits(original))
    tokenizer = AutoTokenizer.from_pretrained(variant)
    tokenizer.add_special_tokens({"pad_token": "<mine>"})
    tokenizer.save_pretrained(variant)
    assert content(base) == before
    prepare_base(variant, str(base))
    ours, theirs = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (variant, base))
    assert ours == theirs, "a second call brings them back"


def test_another_base_replaces_the_first_and_leaves_no_stale_shard_or_link(base, variant, tmp_path):
    prepare_base(variant, str(base))
    base.rename(tmp_path / "moved")
    with refused(r"links to .*base.*, which is gone", UserError):
        weight_map(variant)
    prepare_base(variant, str(write_base(tmp_path / "single")))
    assert [path.name for path in variant.glob("*.safetensors")] == ["model.safetensors"]
    assert not (variant / INDEX).exists()
    assert all(path.stat().st_mode & 0o044 for path in variant.iterdir() if not path.is_symlink())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_new_name_gets_a_configuration_with_half_of_the_layers_routed(tmp_path, family):
    source = write_base(tmp_path / "source", family)
    folder = tmp_path / "ckpt" / "mine"
    prepare_base(folder, str(source))
    fields = json.loads((folder / "config.json").read_text())
    assert fields["mod_layers"] == [2, 3] and fields["model_type"] == family and "mod_base" not in fields
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert is_routed(model) and fields["architectures"] == [type(model).__name__.replace("Mod", "")]
    dense = tiny_logits(AutoModelForCausalLM.from_pretrained(source))
    torch.testing.assert_close(tiny_logits(model), dense, atol=1e-5, rtol=0)


def test_a_gguf_file_is_converted_into_the_folder(base, tmp_path):
    tiny_gguf = pytest.importorskip("tiny_gguf", reason="needs the package gguf")
    tokenizer, folder = AutoTokenizer.from_pretrained(base), tmp_path / "ckpt" / "mine"
    file = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", LlamaForCausalLM.from_pretrained(base), tokenizer)
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


def test_hub_download_is_linked_from_the_cache(base, variant, monkeypatch):
    asked = []

    def fake(repo, revision, allow_patterns):
        asked.append((repo, revision))
        assert not any("bin" in pattern or pattern in ("*", "consolidated*") for pattern in allow_patterns)
        return str(base)

    monkeypatch.setattr(preparing, "snapshot_download", fake)
    prepare_base(variant)
    mine = variant.with_name("mine")
    prepare_base(mine, "other/tiny", revision="v2")
    assert asked == [("someone/tiny", None), ("other/tiny", "v2")]
    assert json.loads((variant / RECORD).read_text())["source"] == "someone/tiny"
    assert json.loads((mine / "config.json").read_text())["mod_base"] == "other/tiny"


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
    (lambda _, variant: change(variant, hidden_size=64), "hidden_size is 32, not 64"),
    (
        lambda _, variant: change(variant, num_hidden_layers=4, vocab_size=65),
        r"vocab_size is \d+, not 65; num_hidden_layers is 5, not 4",
    ),
    (lambda _, variant: change(variant, rope_parameters=ROPE), "rope_parameters is"),
    (lambda _, variant: change(variant, model_type="mistral_mod"), "is a llama model, .* needs a mistral"),
    (lambda _, variant: change(variant, model_type="unheard_of"), "no causal language model of type 'unheard"),
    (lambda _, variant: (variant / "model.safetensors").write_bytes(b"mine"), "was not brought by this command"),
    (lambda _, variant: (variant / "config.json").rename(variant / "dear.txt"), "choose another name"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_what_does_not_fit_is_refused_and_nothing_touched(base, variant, spoil, message):
    spoil(base, variant)
    before = content(base), content(variant)
    with refused(message, UserError):
        prepare_base(variant, str(base))
    assert (content(base), content(variant)) == before and os.listdir(variant.parent) == [variant.name]


@pytest.mark.parametrize("source", ["/none", "./none", "none", "models/none.gguf", "here/none", None])
def test_source_that_is_nothing(variant, source, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def fake(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(preparing, "snapshot_download", fake)
    told = "no folder, no .gguf file, and no hub id" if source else "someone/tiny did not come from the hub: no route"
    with refused(told, UserError):
        prepare_base(variant, source)
    assert os.listdir(variant) == ["config.json"]


def test_command_line(base, variant, command, capsys, monkeypatch):
    monkeypatch.chdir(variant)
    given = ["--ckpt_root", variant.parent, "--folder_name"]
    assert command("checkpoint/prepare_base.py", *given, variant.name, "--source", base) == 0
    assert "holds the base of" in capsys.readouterr().out
    for name, message in (("tinny-mod", "tinny-mod is a new name"), ("../mine", "cannot name a folder")):
        assert command("checkpoint/prepare_base.py", *given, name) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
