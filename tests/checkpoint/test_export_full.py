"""The full export: no shard copied, stock transformers loads it, wrong parts are refused, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_base, write_run
from tiny_models import random_batch
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.checkpoint.export_full import export_full
from router_tuning.errors import UserError
from router_tuning.model import load_routers


@pytest.fixture(scope="module")
def export(tmp_path_factory, run, base):
    folder = tmp_path_factory.mktemp("exports") / "full"
    return folder, export_full(run, base, folder, "# card\n")


def test_shards_are_the_same_files(export, base):
    folder, report = export
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert (folder / shard.name).samefile(shard) and report["links"][shard.name] == "hard"
    assert report["bytes_added"] < 1_000_000
    own = [file for file in folder.iterdir() if file.name not in report["links"]]
    assert sum(file.stat().st_size for file in own) == report["bytes_added"]
    assert all(file.stat().st_nlink == 1 for file in own)


def test_stock_transformers_loads_every_family(tmp_path):
    ids, mask = random_batch(rows=6, padding="left")
    expected = {}
    for family in ("llama", "qwen3", "mixtral"):
        base = write_base(tmp_path / "bases" / family, family)
        run = write_run(tmp_path / "runs" / family, base)
        export_full(run, base, tmp_path / family, "card")
        routed = load_routers(AutoModelForCausalLM.from_pretrained(base), run).eval()
        expected[family] = routed(ids, attention_mask=mask).logits
    torch.save({"ids": ids, "mask": mask, "logits": expected}, tmp_path / "expected.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "saved = torch.load('expected.pt')\n"
        "for family, logits in saved['logits'].items():\n"
        "    model = AutoModelForCausalLM.from_pretrained('./' + family, trust_remote_code=True).eval()\n"
        "    assert type(model).__module__.startswith('transformers_modules'), type(model)\n"
        "    torch.testing.assert_close(model(saved['ids'], attention_mask=saved['mask']).logits, logits)\n"
        "assert 'router_tuning.model' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=300)


def test_reexport_of_a_routed_base_and_of_itself(tmp_path, base, run, export):
    folder, _ = export
    base_of_ours = tmp_path / "llama-mod"
    shutil.copytree(base, base_of_ours)
    config = json.loads((base / "config.json").read_text())
    routed = config | {"model_type": "llama_mod", "architectures": ["LlamaModForCausalLM"], "mod_layers": [0]}
    (base_of_ours / "config.json").write_text(json.dumps(routed))
    export_full(run, base_of_ours, tmp_path / "a", "card")
    export_full(run, folder, tmp_path / "b", "card")
    for name in ("config.json", "model.safetensors.index.json"):
        assert json.loads((tmp_path / "a" / name).read_text()) == json.loads((folder / name).read_text())
        assert json.loads((tmp_path / "b" / name).read_text()) == json.loads((folder / name).read_text())


def test_card_and_tokenizer_travel_with_the_rendering_of_the_run(export, base, run, tmp_path):
    folder, _ = export
    text, talk = "<|user|>\nHi 12\n", [{"role": "user", "content": "Hi"}]
    there, here = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    assert there(text) == here(text) and there.chat_template == here.chat_template
    assert (folder / "README.md").read_text() == "# card\n"
    other = shutil.copytree(run, tmp_path / "run")
    (other / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    export_full(other, base, tmp_path / "full", "card")
    there = AutoTokenizer.from_pretrained(tmp_path / "full")
    assert there.apply_chat_template(talk, tokenize=False) == "<s>Hi"


def test_existing_folder_is_kept_unless_asked(tmp_path, run, base):
    target = tmp_path / "full"
    export_full(run, base, target, "one")
    with pytest.raises(UserError, match="--overwrite"):
        export_full(run, base, target, "two")
    assert (target / "README.md").read_text() == "one"
    export_full(run, base, target, "two", overwrite=True)
    assert (target / "README.md").read_text() == "two"
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="none of our exports"):
        export_full(run, base, stranger, "three", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "stranger"]


@pytest.fixture
def broken(tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def expect_refusal(run, base, tmp_path, message):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        export_full(run, base, tmp_path / "full", "card")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_tampered_routers_are_refused(tmp_path, broken, base):
    path = broken / "router.safetensors"
    good = load_file(path)
    name = next(iter(good))
    save_file({**good, name: torch.full_like(good[name], float("nan"))}, path)
    expect_refusal(broken, base, tmp_path, "no finite floats")
    save_file({**good, name: torch.zeros(1, 7)}, path)
    expect_refusal(broken, base, tmp_path, "shape")
    save_file({**good, "model.layers.0.extra": torch.zeros(1)}, path)
    expect_refusal(broken, base, tmp_path, "extra")
    path.write_bytes(b"\x80\x04pickle")
    expect_refusal(broken, base, tmp_path, "not a valid safetensors")
    path.unlink()
    expect_refusal(broken, base, tmp_path, "no such file")


def test_another_base_is_refused(tmp_path, run, base):
    other = write_base(tmp_path / "other", seed=5)
    expect_refusal(run, other, tmp_path, "other weights")


def test_paths_cannot_escape_and_pickles_are_not_read(tmp_path, run, base):
    evil = tmp_path / "base"
    shutil.copytree(base, evil)
    index = json.loads((evil / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../secret.safetensors"
    (evil / "model.safetensors.index.json").write_text(json.dumps(index))
    expect_refusal(run, evil, tmp_path, "refusing")
    for file in [*evil.glob("*.safetensors"), evil / "model.safetensors.index.json"]:
        file.unlink()
    (evil / "pytorch_model.bin").write_bytes(b"pickle")
    expect_refusal(run, evil, tmp_path, "pickles are not read")
