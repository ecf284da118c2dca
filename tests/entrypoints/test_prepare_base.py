"""Bringing base weights into a folder: links, checks before changes, one clear line on bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from router_tuning.checkpoint import prepare_base as module
from router_tuning.checkpoint.prepare_base import INDEX, RECORD, prepare_base
from router_tuning.embedded.base_training import build_tokenizer
from router_tuning.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
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


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        path.name: (path.lstat().st_mtime_ns, os.readlink(path) if path.is_symlink() else "")
        for path in folder.iterdir()
    }


def test_symlinks_every_file_and_loads(base: Path, variant: Path):
    config = (variant / "config.json").read_text()
    done = prepare_base(variant, str(base))
    shards = {path.name for path in base.glob("*.safetensors")}
    assert shards | {INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(done.linked)
    assert all((variant / name).is_symlink() for name in done.linked)
    assert (variant / "config.json").read_text() == config
    loaded = LlamaForCausalLM.from_pretrained(variant, config=LlamaConfig(**SIZES))
    original = LlamaForCausalLM.from_pretrained(base).state_dict()
    assert all(value.equal(original[name]) for name, value in loaded.state_dict().items())
    text = "Sort the letters.\nInput: QX"
    assert AutoTokenizer.from_pretrained(variant)(text) == AutoTokenizer.from_pretrained(base)(text)


def test_second_call_changes_nothing_but_the_record(base: Path, variant: Path):
    prepare_base(variant, str(base))
    before = listing(variant)
    done = prepare_base(variant, str(base))
    after = listing(variant)
    assert done.linked == [] and before.pop(RECORD) and after.pop(RECORD)
    assert before == after


def test_hard_links_share_the_bytes_and_replace_symlinks(base: Path, variant: Path):
    prepare_base(variant, str(base))
    done = prepare_base(variant, str(base), link="hard")
    assert done.unchanged == []
    for name in done.linked:
        assert not (variant / name).is_symlink() and (variant / name).samefile(base / name)
    assert prepare_base(variant, str(base), link="hard").linked == []


def test_another_base_replaces_the_first_and_leaves_no_stale_shard(base: Path, variant: Path, tmp_path: Path):
    prepare_base(variant, str(base))
    single = tmp_path / "single"
    LlamaForCausalLM.from_pretrained(base).save_pretrained(single)
    AutoTokenizer.from_pretrained(base).save_pretrained(single)
    prepare_base(variant, str(single))
    assert [path.name for path in variant.glob("*.safetensors")] == ["model.safetensors"]
    assert not (variant / INDEX).is_symlink()


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
    prepare_base(variant, "other/tiny", revision="v2")
    assert calls[1] == ("other/tiny", "v2")


def test_hub_failure_is_one_line_and_changes_nothing(variant: Path, monkeypatch: pytest.MonkeyPatch):
    def fake(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(module, "snapshot_download", fake)
    with pytest.raises(UserError, match="someone/tiny did not come from the hub: no route") as caught:
        prepare_base(variant)
    assert "\n" not in str(caught.value)
    assert [path.name for path in variant.iterdir()] == ["config.json"]


def _drop_shard(base: Path) -> None:
    sorted(base.glob("*.safetensors"))[-1].unlink()


def _cut_shard(base: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4])


def _drop_tensor(base: Path) -> None:
    index = json.loads((base / INDEX).read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if name != last}
    (base / INDEX).write_text(json.dumps(index))


def _only_pickle(base: Path) -> None:
    for path in [*base.glob("*.safetensors"), base / INDEX]:
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")


def _escape(base: Path) -> None:
    (base / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))


def _no_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_shard, r"lacks 1 of \d+ shards: model-"),
        (_cut_shard, "is no whole safetensors file"),
        (_drop_tensor, "tensors are missing, the first is"),
        (_only_pickle, "pytorch_model.bin is a pickle"),
        (_escape, "no safetensors file of that folder"),
        (_no_tokenizer, "holds no tokenizer"),
        (lambda base: (base / "config.json").unlink(), "no config.json in"),
        (lambda base: (base / INDEX).write_text("{"), "no safetensors index"),
    ],
)
def test_damaged_base_is_refused_untouched(base: Path, variant: Path, damage, message: str):
    damage(base)
    with pytest.raises(UserError, match=message) as caught:
        prepare_base(variant, str(base))
    assert "\n" not in str(caught.value)
    assert [path.name for path in variant.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "hidden_size is 16, not 32"),
        ({"num_hidden_layers": 4, "vocab_size": 65}, "vocab_size is 64, not 65; num_hidden_layers is 3, not 4"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters is"),
        ({"model_type": "mistral_mod"}, "is a llama model, .* needs a mistral model"),
        ({"model_type": "unheard_of"}, "'unheard_of' is unknown"),
    ],
)
def test_wrong_architecture_names_the_numbers(base: Path, variant: Path, changes: dict, message: str):
    write_variant(variant, **changes)
    with pytest.raises(UserError, match=message):
        prepare_base(variant, str(base))
    assert [path.name for path in variant.iterdir()] == ["config.json"]


def test_own_weights_are_never_replaced(base: Path, variant: Path):
    (variant / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match="was not brought by this command"):
        prepare_base(variant, str(base))
    assert (variant / "model.safetensors").read_bytes() == b"mine"
    assert sorted(path.name for path in variant.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "just-a-name"])
def test_source_that_is_nothing(variant: Path, source: str):
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        prepare_base(variant, source)


def test_command_line(base: Path, variant: Path):
    command = [sys.executable, ROOT / "entrypoints/checkpoint/prepare_base.py", "--ckpt_root", variant.parent]
    good = subprocess.run(
        [*command, "--folder_name", variant.name, "--source", base], capture_output=True, text=True, cwd=variant
    )
    assert good.returncode == 0 and "holds the base weights" in good.stdout, good.stderr
    bad = subprocess.run([*command, "--folder_name", "tinny-mod"], capture_output=True, text=True, cwd=variant)
    assert bad.returncode == 2 and "there are tiny-mod" in bad.stderr.splitlines()[-1]


PUBLISHED = {
    "mistral-7b-mod": (MistralConfig, "mistral_mod", 32, 4096, 14336, 32, 8, 32000, 1e4, 4096, 7_241_732_096),
    "qwen-2.5-7b-mod": (Qwen2Config, "qwen2_mod", 28, 3584, 18944, 28, 4, 152064, 1e6, None, 7_615_616_512),
    "llama3-8b-mod": (LlamaConfig, "llama_mod", 32, 4096, 14336, 32, 8, 128256, 5e5, None, 8_030_261_248),
    "llama3-8b-instruct-mod": (LlamaConfig, "llama_mod", 32, 4096, 14336, 32, 8, 128256, 5e5, None, 8_030_261_248),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_config_only_folders_hold_the_published_numbers(name: str):
    """The parameter count on the meta device is that of the public model, so no number can be off."""
    kind, model_type, layers, hidden, inner, heads, kv, vocab, theta, window, count = PUBLISHED[name]
    values = json.loads((ROOT / "ckpt" / name / "config.json").read_text())
    assert values["model_type"] == model_type and values["mod_granularity"] == "attn_sequence"
    assert values["mod_layers"] == list(range(layers - 1 - layers // 2, layers - 1))
    config = module._plain_config(values, ROOT)
    assert type(config) is kind
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (layers, hidden, inner)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (heads, kv, vocab)
    assert config.rope_parameters == {"rope_theta": theta, "rope_type": "default"}
    assert getattr(config, "sliding_window", None) == window
    with module.torch.device("meta"):
        model = module.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
