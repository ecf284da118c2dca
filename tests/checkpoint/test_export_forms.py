"""Routers alone, LoRA with routers, LoRA merged, all weights tuned: each form holds what the run computed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from tiny_models import random_batch
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.checkpoint.card import model_card
from router_tuning.checkpoint.export_forms import export_adapter, export_merged, export_peft
from router_tuning.checkpoint.export_full import export_full
from router_tuning.checkpoint.run_folder import base_of, data_of
from router_tuning.errors import UserError
from router_tuning.evaluation.models import load_tuned
from router_tuning.model import load_routers


@torch.no_grad()
def logits(model):
    ids, mask = random_batch(rows=6, padding="left")
    return model.eval()(ids, attention_mask=mask).logits


def test_adapter_is_routers_alone(tmp_path, run, base):
    report = export_adapter(run, tmp_path / "adapter", "card")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "router.safetensors",
        "router_config.json",
    ]
    assert report["bytes_added"] < 10_000
    dense = AutoModelForCausalLM.from_pretrained(base)
    torch.testing.assert_close(logits(load_routers(dense, tmp_path / "adapter")), logits(load_tuned(base, run)))


def test_peft_folder(tmp_path, lora_run, base):
    folder, expected = lora_run
    report = export_peft(folder, base, tmp_path / "peft", "card")
    routed = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base")
    loaded = PeftModel.from_pretrained(routed, tmp_path / "peft")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=0)
    assert report["links"] and report["bytes_added"] < 1_000_000
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "peft" / "base")


def test_merged_folder(tmp_path, lora_run, base):
    folder, expected = lora_run
    export_merged(folder, base, tmp_path / "merged", "card")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("A1") == AutoTokenizer.from_pretrained(base)("A1")
    assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "merged").iterdir())


def test_lora_run_is_loaded_with_its_adapter(lora_run, base):
    folder, expected = lora_run
    torch.testing.assert_close(logits(load_tuned(base, folder)), expected, atol=1e-6, rtol=0)


def test_full_form_refuses_lora_and_the_lora_forms_refuse_routers(tmp_path, lora_run, run, base):
    with pytest.raises(UserError, match="--form peft"):
        export_full(lora_run[0], base, tmp_path / "full", "card")
    for export in (export_peft, export_merged):
        with pytest.raises(UserError, match="--lora"):
            export(run, base, tmp_path / "lora", "card")
    assert list(tmp_path.iterdir()) == []


def test_run_that_tuned_all_weights(tmp_path, run, base):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    model = load_routers(AutoModelForCausalLM.from_pretrained(base), run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "model")
    expected = logits(model)
    from router_tuning.model import save_routers

    save_routers(model, folder)
    torch.testing.assert_close(logits(load_tuned(base, folder)), expected)
    export_full(folder, base, tmp_path / "full", "card")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "full")), expected)


RECORD = {
    "arguments": {"folder_name": "tiny-llama-mod", "learning_rate": 0.001, "mod_n": 6, "recipe": "paper", "seed": 1},
    "data": {"path": "/data/mixed/data.jsonl", "rows": 700, "sha256": "0123456789abcdef0000"},
    "reached_capacity": 0.52,
}


def test_card_states_what_the_run_recorded_and_nothing_else(tmp_path, run):
    bare = model_card(run, "adapter")
    assert "## Training" not in bare and "load_routers" in bare and "layers 1, 2, 3" in bare
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(RECORD))
    card = model_card(tmp_path / "run", "full", "| system | score |")
    for fact in ("| reached_capacity | 0.52 |", "700 rows", "`0123456789abcdef`", "| system | score |"):
        assert fact in card
    assert "LEARNING_RATE=0.001" in card and "TARGET_CAPACITY" not in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_base_and_data_of_a_run(tmp_path, base, run):
    with pytest.raises(UserError, match="--base"):
        base_of(run)
    assert base_of(run, base) == base and data_of(run) is None
    (tmp_path / "run.json").write_text(json.dumps({"base": {"path": str(base)}, "data": {"path": "/x/data.jsonl"}}))
    assert base_of(tmp_path) == base and str(data_of(tmp_path)) == "/x/data.jsonl"
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        base_of(tmp_path)
