"""Our own commands on an export: nothing that was tampered with is loaded (the numbers: test_export)."""

import json
import shutil

import pytest
import torch
from refused import refused
from safetensors.torch import load_file, save_file
from tiny_checkpoint import LAYERS, write_base

from router_tuning.checkpoint.exporting import HOLDS, export
from router_tuning.checkpoint.loading import load_export, load_tuned
from router_tuning.errors import UserError

ROUTER = f"model.layers.{LAYERS[0]}.self_attn.mod_router.weight"
OTHER = "model.layers.0.extra"


def edit(path, **changed):
    """Other tensors in a safetensors file; None takes one away."""
    tensors = load_file(path) | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def unindex(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][ROUTER]
    path.write_text(json.dumps(index))


def of_another_base(folder):
    other = write_base(folder.parent / "other", max_shard_size="100KB", seed=5)
    for shard in other.glob("*.safetensors"):
        (folder / shard.name).unlink()
        shutil.copyfile(shard, folder / shard.name)


def routers(**changed):
    return lambda folder: edit(folder / "router.safetensors", **changed)


TAMPERED = {
    "not a number": (routers(**{ROUTER: torch.full((1, 32), float("nan"))}), "no finite floats"),
    "of another shape": (routers(**{ROUTER: torch.zeros(1, 7)}), "shape"),
    "a tensor too many": (routers(**{OTHER: torch.zeros(1)}), "extra"),
    "a router too few": (routers(**{ROUTER: None}), ROUTER),
    "a pickle": (lambda f: (f / "router.safetensors").write_bytes(b"\x80\x04pickle"), "no whole safetensors file"),
    "routers left out of the index": (unindex, f"leaves out {ROUTER}"),
    "weights of another base": (of_another_base, "other weights"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_export_is_refused(what, tmp_path, run, base):
    change, words = TAMPERED[what]
    export(run, base, tmp_path / "full")
    change(tmp_path / "full")
    with refused(words, UserError):
        load_export(tmp_path / "full")


def test_dense_and_absent_checkpoints_are_named(tmp_path, base):
    for folder, words in ((base, "not routed"), (tmp_path, "no checkpoint folder")):
        with refused(words, UserError):
            load_export(folder)


@pytest.mark.parametrize("what", HOLDS)
def test_thresholds_are_those_of_the_run_as_it_was_calibrated_last(tmp_path, tuned, base, what):
    run = shutil.copytree(tuned[what][0], tmp_path / "run")
    config = json.loads((run / "router_config.json").read_text())
    config["mod_threshold"] = {f"{layer}.attn": 0.25 * layer for layer in LAYERS}
    (run / "router_config.json").write_text(json.dumps(config))
    export(run, base, tmp_path / "export", HOLDS[what][-1 if "LoRA" in what else 0])
    for model in (load_tuned(base, run), load_export(tmp_path / "export")):
        assert model.config.mod_threshold == config["mod_threshold"]


def test_a_pickled_or_broken_adapter_is_never_read(tmp_path, lora_run, base):
    run = tmp_path / "run"
    shutil.copytree(lora_run[0], run)
    path = run / "adapter" / "adapter_model.safetensors"
    good = load_file(path)
    name = next(key for key in good if "mod_router" in key)
    for value, words in ((good[name] / 0, "not finite"), (torch.zeros(1, 7), "does not fit")):
        edit(path, **{name: value})
        with refused(words, UserError):
            load_tuned(base, run)
    torch.save(good, run / "adapter" / "adapter_model.bin")  # what peft would fall back to
    path.unlink()
    for load in (lambda: load_tuned(base, run), lambda: export(run, base, tmp_path / "merged", "merged")):
        with refused(r"adapter_model\.safetensors: no such file", UserError):
            load()
