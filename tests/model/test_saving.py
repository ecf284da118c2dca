"""Routers on disk: exact round trip, whole files or none, and one line for every damaged or foreign one."""

from __future__ import annotations

import json
import math
import os
import stat

import pytest
import torch
from refused import refused
from safetensors.torch import load_file, save_file
from tiny_models import logits_of, random_batch, state_of, tiny_model
from tiny_routed import CASES, LAYERS, random_skip_paths, routed_model

from router_tuning.errors import UserError
from router_tuning.model import is_routed, load_routers, route, routed_modules, save_routers, unroute

WEIGHTS, CONFIG = "router.safetensors", "router_config.json"


@pytest.fixture
def saved(tmp_path):
    """A folder with routers of the tiny Llama, and the model that they came from."""
    model = routed_model("llama")
    save_routers(model, tmp_path)
    return tmp_path, model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "onto", "skip"),
    [
        *[(*case, "dense", "zero") for case in CASES],
        *[(*case, "routed", "zero") for case in CASES[::4]],
        ("llama", "attn_token+mlp_sequence", "keep", "dense", "mean"),
        ("llama", "attn_token+mlp_sequence", "keep", "routed", "low_rank"),
    ],
)
def test_round_trip_is_exact(family, granularity, policy, onto, skip, tmp_path):
    routing = {"kv_policy": policy, "router_pooling": "prompt", "skip": skip, "skip_rank": 3}
    model = routed_model(family, granularity, "eager", threshold=0.47, **routing)
    random_skip_paths(model)
    save_routers(model, tmp_path / "new" / "folder")
    other = tiny_model(family, "eager")
    if onto == "routed":
        route(other, mod_layers=LAYERS, granularity=granularity, **routing)
    assert load_routers(other, tmp_path / "new" / "folder") is other
    assert torch.equal(logits_of(other), logits_of(model))
    for ours, theirs in zip(routed_modules(other).values(), routed_modules(model).values(), strict=True):
        assert torch.equal(ours.mod_router.weight, theirs.mod_router.weight)
        assert ours.mod_threshold == 0.47
    half = load_routers(tiny_model(family).bfloat16(), tmp_path / "new" / "folder")  # the same base in another dtype
    for ours, theirs in zip(routed_modules(half).values(), routed_modules(model).values(), strict=True):
        assert torch.equal(ours.mod_router.weight, theirs.mod_router.weight)


PLACES = {"attn": "self_attn.", "mlp": "mlp.", "block": "", "expert": "mlp.experts."}


@pytest.mark.parametrize(
    ("family", "granularity", "skip"),
    [
        *[("llama", g, "zero") for g in ("attn_sequence", "block_token")],
        *[("llama", "attn_token+mlp_token", skip) for skip in ("mean", "low_rank")],
        ("mixtral", "expert_token", "zero"),
    ],
)
def test_exact_keys_shapes_and_type(family, granularity, skip, tmp_path):
    model = routed_model(family, granularity, skip=skip, skip_rank=3)
    save_routers(model, tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    shapes = {"mod_router.weight": (4 if "expert" in granularity else 1, 32)}
    shapes |= {} if skip == "zero" else {"mod_skip.bias": (32,)}
    shapes |= {"mod_skip.down": (32, 3), "mod_skip.up": (3, 32)} if skip == "low_rank" else {}
    places = [PLACES[part.split("_")[0]] for part in granularity.split("+")]
    expected = {f"model.layers.{n}.{at}{name}": shapes[name] for n in LAYERS for at in places for name in shapes}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert set(state) <= set(model.state_dict()) and {value.dtype for value in state.values()} == {torch.float32}
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["mod_granularity"] == granularity and config["mod_layers"] == LAYERS
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS, CONFIG]


def test_saving_twice_gives_the_same_bytes_and_ordinary_permissions(saved):
    folder, model = saved
    before, umask = contents(folder), os.umask(0)
    os.umask(umask)
    save_routers(model, folder)
    assert contents(folder) == before
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}


def test_further_entries_and_gathered_weights(tmp_path):
    model = routed_model()
    state = {name: p.detach().bfloat16() for name, p in model.named_parameters() if "mod_router" in name}
    save_routers(model, tmp_path, state=state, extra={"note": "calibrated on nothing"})
    assert json.loads((tmp_path / CONFIG).read_text())["note"] == "calibrated on nothing"
    for name, weight in load_file(tmp_path / WEIGHTS).items():
        assert torch.equal(weight, state[name].float())
    with refused("do not belong", UserError):
        save_routers(model, tmp_path / "out", state={"model.layers.0.mod_router.weight": torch.zeros(1, 32)})
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- whole files or none


@pytest.mark.parametrize("failing", ["save_file", "os.replace", "os.chmod", "extra"])
def test_a_failing_write_leaves_what_was_there(failing, saved, monkeypatch):
    folder, _ = saved
    before, other = contents(folder), routed_model(seed=1)

    def fail(*args, **kwargs):
        if failing == "save_file":
            open(args[1], "wb").write(b"half a file")
        raise OSError("disk full")

    if failing != "extra":
        monkeypatch.setattr("router_tuning.model.saving.save_file" if failing == "save_file" else failing, fail)
    for place in (folder, folder / "new"):
        with pytest.raises((OSError, TypeError, UserError)):
            save_routers(other, place, extra={"what": object()} if failing == "extra" else None)
    assert contents(folder) == before and not list(folder.glob("new/*"))


# ---------------------------------------------------------------- damaged and foreign files


def edit(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)


def configure(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    config |= fields
    (folder / CONFIG).write_text(json.dumps(config))


KEY = "model.layers.2.self_attn.mod_router.weight"
DAMAGE = {
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "no configuration": lambda f: (f / CONFIG).unlink(),
    "a folder for weights": lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
    "cut weights": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-7]),
    "a pickle": lambda f: torch.save({KEY: torch.ones(1, 32)}, f / WEIGHTS),
    "wide router": lambda f: edit(f, lambda s: s.update({KEY: torch.zeros(1, 33)})),
    "flat router": lambda f: edit(f, lambda s: s.update({KEY: torch.zeros(32)})),
    "not a number": lambda f: edit(f, lambda s: s.update({KEY: torch.full((1, 32), math.nan)})),
    "infinite": lambda f: edit(f, lambda s: s[KEY].view(-1)[3:4].fill_(math.inf)),
    "integers": lambda f: edit(f, lambda s: s.update({KEY: torch.ones(1, 32, dtype=torch.int64)})),
    "a key too many": lambda f: edit(f, lambda s: s.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(1)})),
    "a key too few": lambda f: edit(f, lambda s: s.pop(KEY)),
    "half a JSON": lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:50]),
    "bytes for JSON": lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00\x01"),
    "a list for JSON": lambda f: (f / CONFIG).write_text("[]"),
    "deep JSON": lambda f: (f / CONFIG).write_text("[" * 100_000),
    "another format": lambda f: configure(f, format=99),
    "granularity typo": lambda f: configure(f, mod_granularity="attn_sequenc"),
    "granularity is a number": lambda f: configure(f, mod_granularity=3),
    "layers are a path": lambda f: configure(f, mod_layers="../../etc"),
    "layers beyond the model": lambda f: configure(f, mod_layers=[1, 2, 99]),
    "threshold is text": lambda f: configure(f, mod_threshold="0.5"),
    "thresholds for others": lambda f: configure(f, mod_threshold={"7.mlp": 0.5}),
    "a field too many": lambda f: configure(f, mod_exec="rm -rf /"),
    "policy unknown": lambda f: configure(f, mod_kv_policy="lose"),
    "no base": lambda f: configure(f, base=None),
    "base is a list": lambda f: configure(f, base=["llama"]),
    "other family": lambda f: base(f, model_type="mistral"),
    "other depth": lambda f: base(f, num_hidden_layers=6),
    "other width": lambda f: base(f, hidden_size=64),
    "other weights": lambda f: base(f, probes=[0.5] * 32),
    "probes are text": lambda f: base(f, probes=["a"] * 32),
    "probes too few": lambda f: base(f, probes=[0.1]),
}


def base(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    configure(folder, base=config["base"] | fields)


@pytest.mark.parametrize(
    ("damage", "onto"),
    [
        *[(name, "dense") for name in DAMAGE],
        *[(name, "routed") for name in ("cut weights", "infinite", "other weights")],
    ],
)
def test_damage_is_one_line_and_leaves_the_model_as_it_was(damage, onto, saved):
    folder, _ = saved
    DAMAGE[damage](folder)
    model = tiny_model("llama") if onto == "dense" else routed_model("llama", seed=0, threshold=0.4)
    before, logits = state_of(model), logits_of(model)
    with refused(f"^.*{folder}.{{,400}}$", UserError):
        load_routers(model, folder)
    assert state_of(model) == before and torch.equal(logits_of(model), logits)


@pytest.mark.parametrize(
    ("field", "routing"),
    [
        ("mod_layers", {"mod_layers": [0, 1, 2]}),
        ("granularity", {"granularity": "mlp_sequence"}),
        ("kv_policy", {"kv_policy": "drop"}),
        ("router_pooling", {"router_pooling": "prompt"}),
        ("skip", {"skip": "mean"}),
        ("skip_rank", {"skip_rank": 3}),
    ],
)
def test_a_model_routed_otherwise_is_refused(field, routing, saved):
    folder, _ = saved
    model = route(tiny_model(), **{"mod_layers": LAYERS, **routing})
    with refused(f"{field} is", UserError):
        load_routers(model, folder)
    load_routers(unroute(model), folder)


# ---------------------------------------------------------------- peft


def test_adapters_and_routers_learn_are_saved_and_come_back(tmp_path):
    peft = pytest.importorskip("peft")
    granularity, (ids, _) = "attn_sequence+mlp_token", random_batch()
    adapters = dict(target_modules=["q_proj", "v_proj"], modules_to_save=["mod_router"], init_lora_weights=False)
    wrapped = peft.get_peft_model(routed_model("llama", granularity), peft.LoraConfig(r=2, **adapters))
    wrapped.train()(ids, labels=ids).loss.backward()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad and "mod_router" in name}
    assert is_routed(wrapped) and len(trained) == 6
    for router in trained.values():
        assert router.grad.any() and router.dtype == torch.float32
        router.data -= 0.5 * router.grad
    expected = logits_of(wrapped.eval())
    save_routers(wrapped, tmp_path / "routers")
    state = load_file(tmp_path / "routers" / WEIGHTS)
    assert len(state) == 6
    for name, router in trained.items():
        key = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        assert torch.equal(state[key], router)
    wrapped.save_pretrained(tmp_path / "adapter")

    fresh = route(tiny_model(), mod_layers=LAYERS, granularity=granularity)
    assert torch.equal(logits_of(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()), expected)

    merged = wrapped.merge_and_unload()
    assert is_routed(merged) and torch.allclose(logits_of(merged), expected, atol=1e-4)
    again = load_routers(unroute(merged), tmp_path / "routers")
    assert torch.allclose(logits_of(again), expected, atol=1e-4)


def test_routers_load_into_a_wrapped_model(saved):
    peft = pytest.importorskip("peft")
    folder, model = saved
    fresh = route(tiny_model(), mod_layers=LAYERS)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mod_router"])
    wrapped = load_routers(peft.get_peft_model(fresh, config), folder)
    assert torch.equal(logits_of(wrapped.eval()), logits_of(model))
