"""A routed model is saved, loaded, copied and sent elsewhere as any model of transformers: of every family, whole."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from refused import refused
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, MOE, logits_of, random_batch, tiny_model
from tiny_routed import LAYERS, random_skip_paths, routed_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from router_tuning.model import ModConfig, is_routed, route, routed_modules, set_thresholds, unroute
from router_tuning.model.saving import load_routers, save_routers

load = AutoModelForCausalLM.from_pretrained
EVERYTHING = dict(
    kv_policy="drop", router_pooling="prompt", skip="low_rank", skip_rank=3, target_capacity=0.3, gradient_scale=2.0
)


@pytest.mark.parametrize(
    ("family", "granularity"),
    [
        *[(f, "attn_token+expert_token" if f in MOE else "attn_token+mlp_sequence") for f in FAMILIES],
        *[("llama", g) for g in ("attn_sequence+mlp_token", "block_sequence", "block_token")],
    ],
)
def test_it_comes_back_as_it_was_whichever_way(family, granularity, tmp_path):
    model = routed_model(family, granularity, "eager", **EVERYTHING)
    random_skip_paths(model)
    set_thresholds(model, {name: 0.4 + 0.01 * place for place, name in enumerate(routed_modules(model))})
    model.save_pretrained(tmp_path / "whole")
    again, info = load(tmp_path / "whole", attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(again) is type(model) and type(again.config) is type(model.config)
    routers, dense = save_routers(model, tmp_path / "new" / "folder"), tiny_model(family, "eager")
    alike = route(tiny_model(family, "eager"), mod_layers=LAYERS, granularity=granularity, **EVERYTHING)
    assert load_routers(dense, routers) is dense
    for other in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again)), dense, load_routers(alike, routers)):
        assert torch.equal(logits_of(other), logits_of(model)) and other.model.config is other.config
        assert ModConfig.read_from(other.config) == ModConfig.read_from(model.config)
        assert other is again or other.config is not again.config
    lower = load_routers(tiny_model(family, "eager").bfloat16(), routers)
    for ours, theirs in zip(routed_modules(lower).values(), routed_modules(model).values(), strict=True):
        assert torch.equal(ours.mod_router.weight, theirs.mod_router.weight) and ours.mod_logit == theirs.mod_logit


@pytest.mark.parametrize("task", ["CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_so_do_other_heads_and_the_decoder_inside(task, tmp_path):
    auto = getattr(transformers, f"AutoModelFor{task}")
    plain = auto.from_config(tiny_model("qwen3").config).eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model, (ids, _) = routed_model(model=plain, granularity="attn_token"), random_batch()
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model) and torch.equal(again(ids)[0], model(ids)[0])
    if task == "CausalLM":
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids)[0], model.model(ids)[0])


def test_dense_and_routed_checkpoints_are_never_taken_for_each_other(tmp_path):
    routed_model("llama").save_pretrained(tmp_path)
    with refused("routed model: pass trust_remote_code=True"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    plain = tmp_path / "plain"
    unroute(load(tmp_path)).save_pretrained(plain)
    text = (plain / "config.json").read_text()
    assert not list(plain.glob("*.py")) and "mod_" not in text and "auto_map" not in text
    again, info = load(plain, output_loading_info=True)
    assert type(again) is LlamaForCausalLM and not info["missing_keys"] and not info["unexpected_keys"]


def test_other_checkpoints_of_a_family_are_what_they_are_without_this_package(tmp_path):
    assert type(AutoConfig.for_model("llama")) is LlamaConfig
    assert "bigscience/bloom" in transformers.CONFIG_MAPPING["bloom"].__doc__, "its models are documented from there"
    theirs = tiny_model().config.to_dict() | {"auto_map": {"AutoConfig": "theirs.TheirConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    code = "from transformers import LlamaConfig\nclass TheirConfig(LlamaConfig):\n    theirs = True\n"
    (tmp_path / "theirs.py").write_text(code)
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).theirs, "their own code is preferred"


def test_models_of_one_configuration_share_nothing():
    config = tiny_model().config
    first, second, third = (LlamaForCausalLM(config) for _ in range(3))
    thresholds = {"1.attn": 0.1, "2.attn": 0.2}
    route(first, mod_layers=[1, 2], granularity="attn_token", threshold=thresholds)
    route(second, mod_layers=[3], granularity="mlp_token")
    assert type(third.config) is LlamaConfig and not any(name.startswith("mod_") for name in vars(config))
    twin = type(first)(first.config)
    set_thresholds(first, 0.7)
    thresholds["1.attn"] = 0.9
    assert twin.config.mod_threshold == {"1.attn": 0.1, "2.attn": 0.2} and first.config.mod_threshold == 0.7
    assert list(routed_modules(first)) == list(routed_modules(twin)) == ["1.attn", "2.attn"]
    assert {id(m.config) for m in first.modules() if hasattr(m, "config")} == {id(first.config)}


# ---------------------------------------------------------------- what a checkpoint lacks


def weights(model):
    return [module.mod_router.weight for module in routed_modules(model).values()]


@pytest.fixture
def partial(tmp_path):
    """A checkpoint from which the router of layer 2 was taken, and the model that it came from."""
    model = routed_model("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.2.self_attn.mod_router.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path, model


@pytest.mark.parametrize("how", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}, None])
def test_missing_routers_are_zero_and_said_in_one_line(how, partial, caplog):
    folder, model = partial
    first, second, third = weights(
        load(folder, **({"config": AutoConfig.from_pretrained(folder)} if how is None else how))
    )
    assert torch.equal(first, weights(model)[0]) and torch.equal(third, weights(model)[2])
    assert second.dtype == torch.float32 and not second.any()
    (line,) = [record.getMessage() for record in caplog.records if "router" in record.getMessage()]
    assert str(folder) in line and "layers.2.self_attn" in line and "zero" in line and "\n" not in line


def test_a_missing_router_that_is_offloaded_or_one_that_is_not_finite_is_refused(partial, tmp_path):
    folder, model = partial
    places = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"), "cpu")
    places |= {f"model.layers.{number}": "disk" if number == 2 else "cpu" for number in range(5)}
    options = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    with refused(r"no weights for model\.layers\.2.*offloaded"):
        load(folder, **options)
    model.save_pretrained(folder)
    assert torch.equal(logits_of(load(folder, **options)), logits_of(model))
    weights(model)[1].data[0, 3] = float("nan")
    model.save_pretrained(folder)
    with refused(r"layers\.2\.self_attn\.mod_router.* not finite"):
        load(folder)


def test_whatever_is_built_without_a_checkpoint_starts_at_zero():
    config = routed_model("gemma3_text", "attn_token+mlp_token").config
    built = AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    lower, state = copy.deepcopy(empty), built.state_dict()
    dense = {name: value.bfloat16() for name, value in state.items() if "mod_router" not in name}
    lower.load_state_dict(dense, strict=False, assign=True)
    for model in (built, empty.to_empty(device="cpu"), lower):
        assert len(weights(model)) == 6
        for weight in weights(model):
            assert weight.dtype == torch.float32 and weight.requires_grad and not weight.any() and not weight.is_meta
    lower.load_state_dict({name: value.half() for name, value in state.items()}, assign=True)
    assert {weight.dtype for weight in weights(lower)} == {torch.float32}


FRESH = """
import torch, router_tuning.model
from transformers import AutoModelForCausalLM
ids, mask, logits = torch.load("batch.pt")
torch.set_grad_enabled(False)
for model in (torch.load("model.pt", weights_only=False), AutoModelForCausalLM.from_pretrained("saved")):
    assert torch.equal(model(ids, attention_mask=mask).logits, logits), "other logits"
"""


@pytest.mark.full
def test_another_process_loads_what_was_saved_or_pickled(tmp_path):
    """Without this package: test_stock_tools."""
    model = routed_model("gemma3_text", "attn_sequence+mlp_token")
    model.save_pretrained(tmp_path / "saved")
    torch.save(model, tmp_path / "model.pt")
    torch.save((*random_batch(padding="left"), logits_of(model)), tmp_path / "batch.pt")
    run = subprocess.run([sys.executable, "-P", "-c", FRESH], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


# ---------------------------------------------------------------- training loops, and what cannot be saved


def test_a_checkpoint_of_a_stock_trainer_comes_back_routed(tmp_path):
    model = routed_model("qwen3", "attn_token", gradient_scale=1.0, target_capacity=0.5)
    rows = [{"input_ids": row, "labels": row} for row in random_batch(rows=4)[0]]
    options = {"max_steps": 1, "save_steps": 1, "report_to": [], "use_cpu": True, "learning_rate": 1e-2}
    arguments = transformers.TrainingArguments(tmp_path, **options)
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert torch.equal(logits_of(load(tmp_path / "checkpoint-1")), logits_of(model.eval()))


def test_what_would_come_back_dense_is_not_saved(tmp_path):
    class Own(LlamaForCausalLM):
        pass

    models = (Own(tiny_model().config), tiny_model(), tiny_model().model)
    own, adapted, decoder = (route(model, mod_n=2) for model in models)
    adapted.add_adapter(pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj"]))
    told = {own: "Own is not saved whole", adapted: "adapter alone", decoder: "LlamaModel is not saved alone"}
    for model, words in {**told, own.model: told[decoder]}.items():
        with refused(f"{words}.*save_routers"):
            model.save_pretrained(tmp_path / "lost")
    assert is_routed(copy.deepcopy(own)) and not list(tmp_path.iterdir())


def test_an_adapter_comes_back_on_the_routed_model_or_not_at_all(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "dense")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(routed_model(model=load(tmp_path / "dense")), lora)
    model.save_pretrained(tmp_path / "lost")
    with pytest.raises(Exception, match="routed in memory: save_pretrained it"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lost")
    model.unload().save_pretrained(tmp_path / "routed")
    again = peft.get_peft_model(load(tmp_path / "routed"), lora).eval()
    again.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert is_routed(loaded) and torch.equal(logits_of(loaded), logits_of(again))
