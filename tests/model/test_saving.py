"""Files of routers: what they hold, whole or not at all, one line for a damaged or foreign one."""

import json

import pytest
import torch
from refused import refused
from safetensors.torch import load_file, save_file
from tiny_models import logits_of, random_batch, state_of, tiny_model
from tiny_routed import LAYERS, routed_model

from router_tuning.errors import UserError
from router_tuning.model import is_routed, load_routers, route, save_routers, unroute

WEIGHTS, CONFIG = "router.safetensors", "router_config.json"
ROUTER, PATH = {"mod_router.weight": (1, 32)}, {"mod_skip.bias": (32,)}
LOW_RANK = {"mod_skip.down": (32, 3), "mod_skip.up": (3, 32)}


@pytest.fixture
def saved(tmp_path):
    """A folder with routers of the tiny Llama."""
    return save_routers(routed_model(), tmp_path / "saved")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("family", "granularity", "skip", "places", "shapes"),
    [
        ("llama", "attn_sequence", "zero", ["self_attn."], ROUTER),
        ("llama", "block_token", "zero", [""], ROUTER),
        ("llama", "attn_token+mlp_token", "mean", ["self_attn.", "mlp."], ROUTER | PATH),
        ("llama", "attn_token+mlp_token", "low_rank", ["self_attn.", "mlp."], ROUTER | PATH | LOW_RANK),
        ("mixtral", "expert_token", "zero", ["mlp.experts."], {"mod_router.weight": (4, 32)}),
    ],
)
def test_exact_keys_shapes_and_type(family, granularity, skip, places, shapes, tmp_path):
    model = routed_model(family, granularity, skip=skip, skip_rank=3)
    save_routers(model, tmp_path)
    state, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    expected = {f"model.layers.{n}.{at}{name}": shapes[name] for n in LAYERS for at in places for name in shapes}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert set(state) <= set(model.state_dict()) and {value.dtype for value in state.values()} == {torch.float32}
    assert config["mod_granularity"] == granularity and config["mod_layers"] == LAYERS
    assert set(contents(tmp_path)) == {WEIGHTS, CONFIG}


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


@pytest.mark.parametrize("failing", ["weights", "configuration"])
def test_a_failing_write_leaves_what_was_there(failing, saved, monkeypatch):
    def half_a_file(_, path, **options):
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    before, extra = contents(saved), {"what": object()} if failing == "configuration" else {}
    if failing == "weights":
        monkeypatch.setattr("router_tuning.model.saving.save_file", half_a_file)
    for folder in (saved, saved.with_name("new")):
        with pytest.raises((TypeError, OSError)):
            save_routers(routed_model(seed=1), folder, extra=extra)
    assert contents(saved) == before and not list(saved.parent.glob("new/*"))


# ---------------------------------------------------------------- damaged and foreign files


def edit(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def configure(folder, **fields):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))


def base(folder, **fields):
    configure(folder, base=json.loads((folder / CONFIG).read_text())["base"] | fields)


KEY = "model.layers.2.self_attn.mod_router.weight"
DAMAGE = {
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "no configuration": lambda f: (f / CONFIG).unlink(),
    "a folder for weights": lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
    "cut weights": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-7]),
    "a pickle": lambda f: torch.save({KEY: torch.ones(1, 32)}, f / WEIGHTS),
    "wide router": lambda f: edit(f, lambda s: s.update({KEY: torch.zeros(1, 33)})),
    "infinite": lambda f: edit(f, lambda s: s[KEY].view(-1)[3:4].fill_(float("inf"))),
    "integers": lambda f: edit(f, lambda s: s.update({KEY: torch.ones(1, 32, dtype=torch.int64)})),
    "a key too many": lambda f: edit(f, lambda s: s.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(1)})),
    "a key too few": lambda f: edit(f, lambda s: s.pop(KEY)),
    "half a JSON": lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:50]),
    "bytes for JSON": lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00\x01"),
    "a list for JSON": lambda f: (f / CONFIG).write_text("[]"),
    "deep JSON": lambda f: (f / CONFIG).write_text("[" * 100_000),
    "another format": lambda f: configure(f, format=99),
    "granularity typo": lambda f: configure(f, mod_granularity="attn_sequenc"),
    "layers are a path": lambda f: configure(f, mod_layers="../../etc"),
    "thresholds for others": lambda f: configure(f, mod_threshold={"7.mlp": 0.5}),
    "a field too many": lambda f: configure(f, mod_exec="rm -rf /"),
    "no base": lambda f: configure(f, base=None),
    "base is a list": lambda f: configure(f, base=["llama"]),
    "other family": lambda f: base(f, model_type="mistral"),
    "other depth": lambda f: base(f, num_hidden_layers=6),
    "other width": lambda f: base(f, hidden_size=64),
    "other weights": lambda f: base(f, probes=[0.5] * 32),
    "probes are text": lambda f: base(f, probes=["a"] * 32),
    "probes too few": lambda f: base(f, probes=[0.1]),
}


@pytest.mark.parametrize(
    ("damage", "onto"),
    [*[(name, "dense") for name in DAMAGE], *[(name, "routed") for name in ("cut weights", "infinite", "no base")]],
)
def test_damage_is_one_line_and_leaves_the_model_as_it_was(damage, onto, saved):
    DAMAGE[damage](saved)
    model = tiny_model() if onto == "dense" else routed_model(threshold=0.4)
    before, logits = state_of(model), logits_of(model)
    with refused(f"^.*{saved}.{{,400}}$", UserError):
        load_routers(model, saved)
    assert state_of(model) == before and torch.equal(logits_of(model), logits)


OTHERWISE = {
    "mod_layers": [0, 1, 2], "granularity": "mlp_sequence", "kv_policy": "drop", "router_pooling": "prompt",
    "skip": "mean", "skip_rank": 3,
}  # fmt: skip


@pytest.mark.parametrize("field", OTHERWISE)
def test_a_model_routed_otherwise_is_refused(field, saved):
    model = route(tiny_model(), **{"mod_layers": LAYERS, field: OTHERWISE[field]})
    with refused(f"{field} is", UserError):
        load_routers(model, saved)
    load_routers(unroute(model), saved)


# ---------------------------------------------------------------- peft


def test_adapters_and_routers_learn_are_saved_and_come_back(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = dict(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["mod_router"])
    routing, (ids, _) = {"mod_layers": LAYERS, "granularity": "attn_sequence+mlp_token"}, random_batch()
    plain = routed_model("llama", routing["granularity"])
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(**adapter, init_lora_weights=False))
    wrapped.train()(ids, labels=ids).loss.backward()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad and "mod_router" in name}
    assert is_routed(wrapped) and len(trained) == 6
    for router in trained.values():
        assert router.grad.any() and router.dtype == torch.float32
        router.data -= 0.5 * router.grad
    expected = logits_of(wrapped.eval())
    state = load_file(save_routers(wrapped, tmp_path / "routers") / WEIGHTS)
    names = {n.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): n for n in trained}
    assert state.keys() == names.keys() and all(torch.equal(state[n], trained[names[n]]) for n in state)
    wrapped.save_pretrained(tmp_path / "adapter")

    fresh = peft.PeftModel.from_pretrained(route(tiny_model(), **routing), tmp_path / "adapter")
    assert torch.equal(logits_of(fresh.eval()), expected)
    merged = wrapped.merge_and_unload()
    assert is_routed(merged) and torch.allclose(logits_of(merged), expected, atol=1e-4)
    assert torch.allclose(logits_of(load_routers(unroute(merged), tmp_path / "routers")), expected, atol=1e-4)
    bare = load_routers(tiny_model(), tmp_path / "routers")
    onto = load_routers(
        peft.get_peft_model(route(tiny_model(), **routing), peft.LoraConfig(**adapter)), tmp_path / "routers"
    )
    assert torch.equal(logits_of(onto.eval()), logits_of(bare)), "a new adapter changes nothing"
