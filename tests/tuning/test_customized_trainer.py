"""The trainer: loss and logs against a computation by hand, what trains and what does not, exact resumption."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_checkpoint
import tiny_tuning
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.model import load_routers, record_routing
from router_tuning.tuning.batching import Collator, StepOrder
from router_tuning.tuning.tuning_data import check_file, encode_file

LAYERS = tiny_checkpoint.LAYERS


@pytest.fixture(scope="module")
def encoded(parts):
    return encode_file(check_file(parts["data"], 0), AutoTokenizer.from_pretrained(parts["base"]), 2048)


def micro_batches_of_step(encoded, parts, step, size=2, global_batch=8):
    order = list(StepOrder(encoded.lengths, global_batch, tiny_tuning.SETTINGS["seed"]))
    rows = order[step * global_batch : (step + 1) * global_batch]
    collator = Collator(AutoTokenizer.from_pretrained(parts["base"]))
    return [collator([encoded.rows[row] for row in rows[i : i + size]]) for i in range(0, global_batch, size)]


def start_model(parts):
    model = load_routers(AutoModelForCausalLM.from_pretrained(parts["base"], dtype=torch.float32), parts["start"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mod_router" in name)
    return model.train()


def by_hand(model, batches, target=0.4, scale=0.7, smoothing=0.0):
    """Loss of a step: mean over all tokens with loss, and mean penalty of the micro-batches."""
    losses, tokens, penalties, kept = [], 0, [], {layer: [] for layer in LAYERS}
    for batch in batches:
        with record_routing(model) as log:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        losses.append(
            cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing)
        )
        tokens += int((labels != -100).sum())
        penalties.append(log.penalty(target))
        for layer in LAYERS:
            kept[layer].append(log.decisions[layer])
    task, penalty = sum(losses) / tokens, sum(penalties) / len(penalties)
    capacity = {layer: torch.cat(decisions).float().mean().item() for layer, decisions in kept.items()}
    return task + scale * penalty, task.item(), penalty.item(), capacity


def test_logged_losses_and_capacities_are_those_of_a_computation_by_hand(encoded, parts, finished):
    model = start_model(parts)
    loss, task, penalty, capacity = by_hand(model, micro_batches_of_step(encoded, parts, 0))
    line = tiny_tuning.history(finished)[0]
    assert line["loss"] == pytest.approx(loss.item(), abs=2e-5)
    assert line["task_loss"] == pytest.approx(task, abs=2e-5)
    assert line["penalty"] == pytest.approx(penalty, abs=1e-6)
    for layer in LAYERS:
        assert line[f"capacity_layer_{layer:02d}"] == pytest.approx(capacity[layer], abs=1e-6)
    assert line["capacity"] == pytest.approx(sum(capacity.values()) / len(LAYERS), abs=1e-6)
    assert 0 < line["capacity"] < 1, "mixed decisions, or this shows little"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_sgd_step_follows_the_gradient_of_that_loss(encoded, parts, tmp_path, smoothing):
    settings = {"optim": "sgd", "max_grad_norm": 0, "max_steps": 1, "warmup_steps": 0, "learning_rate": 0.5}
    settings |= {"label_smoothing_factor": smoothing}
    tiny_tuning.tune(parts, tmp_path / "run", **settings)
    model = start_model(parts)
    by_hand(model, micro_batches_of_step(encoded, parts, 0), smoothing=smoothing)[0].backward()
    trained = load_file(tmp_path / "run" / "router.safetensors")
    for layer in LAYERS:
        name = f"model.layers.{layer}.self_attn.mod_router.weight"
        weight = model.get_parameter(name)
        torch.testing.assert_close(trained[name], weight.detach() - 0.5 * weight.grad, rtol=1e-4, atol=2e-6)
        assert weight.grad.abs().max() > 1e-4


def test_routers_change_and_everything_else_stays_bit_equal(parts, tmp_path):
    tuned = tiny_tuning.tune(parts, tmp_path / "run", num_train_epochs=1)
    base, start = load_file(parts["base"] / "model.safetensors"), load_file(parts["start"] / "router.safetensors")
    for name, parameter in tuned.trainer.model.named_parameters():
        assert torch.equal(parameter, (base | start)[name]) == ("mod_router" not in name), name
        assert "mod_router" in name or parameter.grad is None


def test_a_checkpoint_holds_what_trains_and_little_else(finished):
    folder, routers = finished / "checkpoint-6", set(load_file(finished / "router.safetensors"))
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert set(load_file(folder / "trainable.safetensors")) == set(moments) == routers
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(next(iter(moments.values())))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_ends_with_the_same_bits_and_the_same_log(parts, finished, tmp_path, step):
    """Step 2 lies within the first epoch, step 4 in the second."""
    run = tmp_path / "run"
    shutil.copytree(finished / f"checkpoint-{step}", run / f"checkpoint-{step}")
    tiny_tuning.tune(parts, run, resume_from_checkpoint="auto")
    assert (run / "router.safetensors").read_bytes() == (finished / "router.safetensors").read_bytes()
    ours, theirs = tiny_tuning.history(run), tiny_tuning.history(finished)
    for line in [*ours, *theirs]:
        del line["tokens_per_second"], line["memory_gb"]
    assert ours == theirs


def test_dropout_draws_do_not_depend_on_interruptions(parts, tmp_path):
    settings = {"lora": True, "lora_dropout": 0.3, "num_train_epochs": 1, "router_dir": None}
    tiny_tuning.tune(parts, tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    torch.manual_seed(123456)
    tiny_tuning.tune(parts, tmp_path / "run", resume_from_checkpoint="auto", **settings)
    whole, resumed = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    tiny_tuning.tune(parts, tmp_path / "other", **{**settings, "lora_dropout": 0.0})
    dry = load_file(tmp_path / "other" / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(whole[name], dry[name]) for name in whole), "dropout does something"


def test_measured_capacity_is_that_of_the_saved_routers_at_inference(encoded, parts, finished):
    measured = json.loads((finished / "run.json").read_text())
    model = load_routers(AutoModelForCausalLM.from_pretrained(parts["base"]), finished).eval()
    batches = [batch for step in range(3) for batch in micro_batches_of_step(encoded, parts, step)]
    kept = []
    for batch in batches:
        with record_routing(model) as log, torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        kept.append(torch.stack([log.decisions[layer] for layer in LAYERS]))
    assert measured["reached_capacity"] == pytest.approx(torch.cat(kept, dim=1).float().mean().item(), abs=1e-6)


def test_gradient_checkpointing_changes_nothing(parts, finished, tmp_path):
    tiny_tuning.tune(parts, tmp_path / "run", gradient_checkpointing=True)
    ours, theirs = load_file(tmp_path / "run" / "router.safetensors"), load_file(finished / "router.safetensors")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
