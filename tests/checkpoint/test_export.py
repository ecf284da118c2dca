"""Exports: each form holds what the run trained or is refused, stands alone, and appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from refused import refused
from tiny_checkpoint import tiny_logits, tuned_run, write_base
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from router_tuning.checkpoint.exporting import FORMS, HOLDS, export
from router_tuning.checkpoint.import_published import import_published
from router_tuning.checkpoint.loading import load_export, load_tuned
from router_tuning.errors import UserError
from router_tuning.model import load_routers

HELD = [(what, form) for what, forms in HOLDS.items() for form in forms]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(form: str, folder: Path, base: Path) -> torch.nn.Module:
    """As a user of stock transformers and peft loads it, once this package is imported."""
    if form == "adapter":
        return load_routers(AutoModelForCausalLM.from_pretrained(base), folder)
    if form == "peft":
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "family, what, form",
    [
        *[("llama", *held) for held in HELD],
        ("gemma3_text", "routers and LoRA", "merged"),  # its head is its embedding
        ("mixtral", "routers and LoRA", "peft"),
        ("phi", "routers", "full"),  # other names of modules, and biases
    ],
)
def test_an_export_stands_alone_and_computes_what_the_run_did(tmp_path, family, what, form):
    base, run, folder = (tmp_path / name for name in ("base", "run", "export"))
    write_base(base, family)
    expected = tuned_run(run, base, what)
    torch.testing.assert_close(tiny_logits(load_tuned(base, run)), expected, atol=1e-6, rtol=0)
    before = content(base), content(run)
    (tmp_path / "new").touch()
    export(run, base, folder, form)
    assert (content(base), content(run)) == before
    for path in filter(Path.is_file, folder.rglob("*")):
        assert not path.is_symlink() and path.stat().st_nlink == 1, "what is done to it reaches neither"
        assert path.stat().st_mode == (tmp_path / "new").stat().st_mode
    shutil.rmtree(run)
    if form != "adapter":
        shutil.rmtree(base)
        loaded = load_export(folder)
        torch.testing.assert_close(tiny_logits(loaded), expected, atol=2e-5, rtol=0)
        with_config = AutoTokenizer.from_pretrained(folder / "base" if form == "peft" else folder)
        assert with_config.decode(with_config("A1")["input_ids"]) == "A1"
    torch.testing.assert_close(tiny_logits(load(form, folder, base)), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("what, form", [(what, form) for what in HOLDS for form in FORMS if (what, form) not in HELD])
def test_a_form_that_would_leave_something_out_is_refused(tmp_path, base, tuned, what, form):
    words = f"trained {what}, which --form {form} does not hold: use --form {HOLDS[what][0]}"
    with refused(words, UserError):
        export(tuned[what][0], base, tmp_path / "export", form)
    assert not list(tmp_path.iterdir())


def test_linked_weights_are_told_and_no_stock_tool_writes_into_the_base(tmp_path, base, run):
    before, folder = content(base), tmp_path / "full"
    assert export(run, base, folder, card="# card\n", link=True) < 1_000_000
    assert {p.name for p in folder.iterdir() if p.is_symlink()} == {p.name for p in base.glob("*.safetensors")}
    assert f"links into `{base}`" in (folder / "README.md").read_text()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_export(folder)
    torch.testing.assert_close(tiny_logits(model), tiny_logits(load_tuned(base, run)))
    tokenizer.add_special_tokens({"pad_token": "<mine>"})
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    GenerationConfig.from_pretrained(folder, max_new_tokens=7).save_pretrained(folder)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert content(base) == before


def test_a_base_that_links_lead_to_and_that_is_gone_is_named(tmp_path, base, run):
    shutil.copytree(base, tmp_path / "base")
    export(run, tmp_path / "base", tmp_path / "full", link=True)
    shutil.rmtree(tmp_path / "base")
    with refused(f"links to {tmp_path / 'base'}.*, which is gone", UserError):
        load_export(tmp_path / "full")


def test_reexport_of_a_routed_base_and_of_itself(tmp_path, base, run):
    export(run, base, tmp_path / "full")
    shutil.copytree(base, tmp_path / "llama-mod")
    routed = {"model_type": "llama_mod", "architectures": ["LlamaModForCausalLM"], "mod_layers": [0]}
    config = json.loads((base / "config.json").read_text()) | routed
    (tmp_path / "llama-mod" / "config.json").write_text(json.dumps(config))
    for source in ("llama-mod", "full"):
        export(run, tmp_path / source, tmp_path / f"of-{source}")
        for name in ("config.json", "model.safetensors.index.json"):
            assert (tmp_path / f"of-{source}" / name).read_text() == (tmp_path / "full" / name).read_text()


def test_the_template_and_tokenizer_of_the_run_travel(tmp_path, base, run):
    def exported(name, **options):
        export(tmp_path / "run", base, tmp_path / name, **options)
        return AutoTokenizer.from_pretrained(tmp_path / name)

    shutil.copytree(run, tmp_path / "run")
    text, other = "<|user|>\nHi 12\n", AutoTokenizer.from_pretrained(base)
    assert exported("plain", card="# card\n")(text) == other(text)
    assert (tmp_path / "plain" / "README.md").read_text() == "# card\n"
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ bos_token }}mine")
    assert exported("template").chat_template == "{{ bos_token }}mine"
    other.add_tokens(["<mine>"])
    other.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"tokenizer": {"name": str(tmp_path / "tokenizer")}}))
    found = exported("other")
    assert len(found) == len(other) and found.chat_template == "{{ bos_token }}mine"


def test_existing_folder_is_kept_unless_asked(tmp_path, run, base):
    target, stranger = tmp_path / "full", tmp_path / "stranger"
    export(run, base, target, card="one")
    with refused("--overwrite", UserError):
        export(run, base, target, card="two")
    assert (target / "README.md").read_text() == "one"
    export(run, base, target, card="two", overwrite=True)
    assert (target / "README.md").read_text() == "two"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("dear")
    with refused("none of our exports", UserError):
        export(run, base, stranger, card="three", overwrite=True)
    tuned = shutil.copytree(run, tmp_path / "tuned")
    (tuned / "run.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match="tuned is a tuning run"):
        export(tuned, base, tuned, overwrite=True)
    with pytest.raises(UserError, match="tuned is a tuning run"):
        import_published(base, base, tuned, "attn_sequence", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "stranger", "tuned"]


def test_another_base_is_refused_and_a_full_disk_is_one_line(tmp_path, run, base, full_disk):
    other = write_base(tmp_path / "other", seed=5)
    with refused("other weights", UserError):
        export(run, other, tmp_path / "full")
    with full_disk(9000), refused("cannot be written: File too large", UserError):
        export(run, base, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
