"""The model card, and where a run's base and data are found."""

from __future__ import annotations

import json
import shutil

from huggingface_hub import ModelCard
from refused import refused

from router_tuning.checkpoint.card import model_card
from router_tuning.errors import UserError
from router_tuning.tuning.run_folder import base_of, data_of

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
    assert "\nlearning_rate: 0.001\n" in card and "target_capacity" not in card
    assert ModelCard(card).data.library_name == "transformers"


def test_base_and_data_of_a_run(tmp_path, base, run, monkeypatch):
    """Named by the run, or given; never outside ``ckpt/`` by a name that no run wrote."""
    monkeypatch.setattr("router_tuning.tuning.run_folder.ROOT", tmp_path / "root")
    for folder in (tmp_path / "elsewhere", tmp_path / "root", tmp_path / "root" / "ckpt" / "base"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")

    def recorded(content: object) -> None:
        (tmp_path / "run.json").write_text(content if isinstance(content, str) else json.dumps(content))

    assert base_of(run, base) == base and data_of(run) is None
    recorded({"base": {"path": str(base)}, "data": {"path": "/x/data.jsonl"}})
    assert base_of(tmp_path) == base and str(data_of(tmp_path)) == "/x/data.jsonl"
    recorded({"arguments": {"folder_name": "base"}})
    assert base_of(tmp_path) == tmp_path / "root" / "ckpt" / "base"
    outside = [{"arguments": {"folder_name": name}} for name in ("../../elsewhere", "..", "/etc", 7)]
    for content, message in (
        *[(content, "--base") for content in ({}, *outside)],
        ("{", "not valid JSON"),
        ({"arguments": [], "data": None}, "objects under arguments"),
    ):
        recorded(content)
        with refused(message, UserError):
            base_of(tmp_path)
