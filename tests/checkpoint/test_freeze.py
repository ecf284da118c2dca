"""Freezing: a plain checkpoint whose numbers are those of the fixed policy."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_checkpoint import LAYERS
from tiny_models import random_batch, tiny_model
from transformers import AutoModelForCausalLM

from router_tuning.checkpoint.freeze import freeze
from router_tuning.errors import UserError
from router_tuning.model import force_routing, is_routed, route, routed_modules


@torch.no_grad()
def logits(model):
    ids, mask = random_batch(rows=4, padding="left")
    return model.eval()(ids, attention_mask=mask).logits


@pytest.mark.parametrize(
    "family, granularity",
    [
        *[("llama", g) for g in ("attn_sequence", "mlp_token", "block_sequence", "attn_token+mlp_token")],
        *[("gemma3_text", g) for g in ("block_sequence", "attn_token+mlp_token")],  # layers of two kinds
        *[(family, "block_sequence") for family in ("phi", "qwen2")],
    ],
)
def test_frozen_equals_forced_policy(tmp_path, family, granularity):
    model = route(tiny_model(family), mod_layers=[1, 2, 3], granularity=granularity, kv_policy="drop")
    parts = [name.split("_")[0] for name in granularity.split("+")]
    keys = {(layer, part): layer != 2 for layer in (1, 2, 3) for part in parts}
    with force_routing(model, {key if len(parts) > 1 else key[0]: keep for key, keep in keys.items()}):
        expected = logits(model)
    frozen = freeze(model, [f"2.{part}" for part in parts])
    assert not is_routed(model) and not any("mod" in name for name in vars(model.config) if name.startswith("mod_"))
    torch.testing.assert_close(logits(model), expected)
    assert frozen.removed == ((2,) if parts == ["block"] else ()) and len(frozen.kept) == 2 * len(parts)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert again.config.num_hidden_layers == (4 if parts == ["block"] else 5)
    torch.testing.assert_close(logits(again), expected)
    ids, _ = random_batch(rows=2)
    cached = again.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=0)
    plain = again.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain), "layers must find their own cache after others were removed"


@torch.no_grad()
@pytest.mark.parametrize(
    "family, skip, held", [("phi", "mean", True), ("llama", "mean", False), ("phi", "low_rank", False)]
)
def test_a_skip_path_is_kept_where_the_checkpoint_has_a_place_for_it(family, skip, held):
    model = route(tiny_model(family), mod_layers=[2], granularity="mlp_token", skip=skip)
    path = routed_modules(model)["2.mlp"].mod_skip
    for parameter in path.parameters():
        parameter.normal_()
    assert freeze(model, ["2.mlp"]).lost == (() if held else ("2.mlp",))
    if held:
        given = []
        model.model.layers[2].mlp.register_forward_hook(lambda *seen: given.append(seen[2]))
        logits(model)
        torch.testing.assert_close(given[0], path.bias.expand_as(given[0]))


def test_refusals(tmp_path):
    model = route(tiny_model(), mod_layers=[1])
    with pytest.raises(UserError, match=r"9\.attn.*1\.attn"):
        freeze(model, ["9.attn"])
    experts = route(tiny_model("mixtral"), mod_layers=[1], granularity="expert_token")
    with pytest.raises(UserError, match="single experts"):
        freeze(experts, ["1.expert"])
    assert is_routed(model) and is_routed(experts), "a refusal changes nothing"
    mixed = route(tiny_model("qwen3_moe", mlp_only_layers=[3]), mod_layers=[2], granularity="block_sequence")
    with pytest.raises(UserError, match="cannot say that layers .2,. are gone"):
        freeze(mixed, ["2.block"])


def test_command_measures_the_loss(tmp_path, root, command, base, run, lora_run, capsys):
    rows = ["--rows", root / "data/sample/heldout", "--rows_per_file", "2"]
    drop = ["--drop", f"{LAYERS[0]}.attn", "--output", tmp_path / "frozen"]
    assert command("checkpoint/freeze_static.py", "--run", lora_run[0], *rows, *drop) == 2
    assert "LoRA" in capsys.readouterr().err and not (tmp_path / "frozen").exists()
    assert command("checkpoint/freeze_static.py", "--run", run, "--base", base, *rows, *drop) == 0
    facts = json.loads((tmp_path / "frozen" / "frozen_routing.json").read_text())
    assert facts["silenced"] == ["1.attn"] and facts["rows"] == 26 and len(set(facts["loss"].values())) == 3
    card = (tmp_path / "frozen" / "README.md").read_text()
    assert f"{facts['loss']['frozen']:.4f}" in card and f"freeze_static.py --run {run}" in card
    ModelCard(card)
