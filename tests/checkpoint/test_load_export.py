"""Our own commands on an export: the same numbers as the run, and nothing tampered with is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import LAYERS, write_base

from router_tuning.checkpoint import exporting as exports
from router_tuning.checkpoint.loading import load_export, load_tuned
from router_tuning.errors import UserError


@pytest.fixture
def export(tmp_path, run, base):
    exports.export(run, base, tmp_path / "full")
    return tmp_path / "full"


def refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        load_export(folder)
    assert "\n" not in str(caught.value)


def test_tampered_routers_are_refused(export):
    path = export / "router.safetensors"
    good = load_file(path)
    name = next(iter(good))
    for tensors, message in (
        ({**good, name: torch.full_like(good[name], float("nan"))}, "no finite floats"),
        ({**good, name: torch.zeros(1, 7)}, "shape"),
        ({**good, "model.layers.0.extra": torch.zeros(1)}, "extra"),
        ({key: value for key, value in good.items() if key != name}, name),
    ):
        save_file(tensors, path)
        refused(export, message)
    path.write_bytes(b"\x80\x04pickle")
    refused(export, "no whole safetensors file")


def test_an_index_cannot_leave_routers_out(export):
    path = export / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    router = next(name for name in index["weight_map"] if "mod_router" in name)
    files = {key: file for key, file in index["weight_map"].items() if key != router}
    path.write_text(json.dumps({**index, "weight_map": files}))
    refused(export, f"leaves out {router}")


def test_weights_of_another_base_are_refused(tmp_path, export):
    other = write_base(tmp_path / "other", max_shard_size="100KB", seed=5)
    for shard in other.glob("*.safetensors"):
        (export / shard.name).unlink()
        shutil.copyfile(shard, export / shard.name)
    refused(export, "other weights")


def test_dense_and_absent_checkpoints_are_named(tmp_path, base):
    refused(base, "not routed")
    refused(tmp_path, "no checkpoint folder")


@pytest.mark.parametrize("what", exports.HOLDS)
def test_thresholds_are_those_of_the_run_as_it_was_calibrated_last(tmp_path, tuned, base, what):
    run = shutil.copytree(tuned[what][0], tmp_path / "run")
    config = json.loads((run / "router_config.json").read_text())
    config["mod_threshold"] = {f"{layer}.attn": 0.25 * layer for layer in LAYERS}
    (run / "router_config.json").write_text(json.dumps(config))
    exports.export(run, base, tmp_path / "export", exports.HOLDS[what][-1 if "LoRA" in what else 0])
    for model in (load_tuned(base, run), load_export(tmp_path / "export")):
        assert model.config.mod_threshold == config["mod_threshold"]


def test_a_pickled_or_broken_adapter_is_never_read(tmp_path, lora_run, base):
    run = tmp_path / "run"
    shutil.copytree(lora_run[0], run)
    path = run / "adapter" / "adapter_model.safetensors"
    good = load_file(path)
    name = next(key for key in good if "mod_router" in key)
    for tensors, message in (
        ({**good, name: torch.full_like(good[name], float("inf"))}, "not finite"),
        ({**good, name: torch.zeros(1, 7)}, "does not fit"),
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match=message):
            load_tuned(base, run)
    torch.save(good, run / "adapter" / "adapter_model.bin")  # what peft would fall back to
    path.unlink()
    for load in (lambda: load_tuned(base, run), lambda: exports.export(run, base, tmp_path / "merged", "merged")):
        with pytest.raises(UserError, match=r"adapter_model\.safetensors: no such file"):
            load()
