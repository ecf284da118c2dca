"""The trainer: loss and logs against a computation by hand, what trains and what does not, exact resumption."""

import pytest
import tiny_checkpoint
import tiny_tuning
import torch
from safetensors.torch import load_file
from tiny_tuning import history, record, resume, routers, tune
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.model import load_routers, record_routing
from router_tuning.tuning.batching import Collator, StepOrder
from router_tuning.tuning.trainer.routing_statistics import layer_key
from router_tuning.tuning.tuning_data import check_file, encode_file

ONE_STEP = {"max_steps": 1, "warmup_steps": 0}


@pytest.fixture(scope="module")
def micro_batches(parts):
    """Those of a step."""
    tokenizer = AutoTokenizer.from_pretrained(parts["base"])
    data = encode_file(check_file(parts["data"], 0), tokenizer, 2048)
    order = list(StepOrder(data.lengths, 8, tiny_tuning.SETTINGS["seed"]))
    return lambda step: [
        Collator(tokenizer)([data.rows[row] for row in order[first : first + 2]])
        for first in range(8 * step, 8 * step + 8, 2)
    ]


def start_model(parts):
    model = load_routers(AutoModelForCausalLM.from_pretrained(parts["base"], dtype=torch.float32), parts["start"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mod_router" in name)
    return model.train()


def by_hand(model, batches, target=0.4, scale=0.7, smoothing=0.0):
    """Loss of a step: mean over all tokens with loss, and mean penalty of the micro-batches; what they kept."""
    losses, tokens, penalties, kept = [], 0, [], {}
    for batch in batches:
        with record_routing(model) as log:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        options = {"reduction": "sum", "label_smoothing": smoothing}
        losses.append(cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), **options))
        tokens += int((labels != -100).sum())
        penalties.append(log.penalty(target))
        for key, keep in log.decisions.items():
            real = batch["attention_mask"].bool() if keep.dim() > 1 else slice(None)
            kept.setdefault(layer_key(key), []).append(keep[real])
    task, penalty = sum(losses) / tokens, sum(penalties) / len(penalties)
    capacity = {key: torch.cat(decisions).float().mean().item() for key, decisions in kept.items()}
    return task + scale * penalty, task.item(), penalty.item(), capacity


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "attn_sequence+mlp_token"])
def test_logged_losses_and_capacities_are_those_of_a_computation_by_hand(micro_batches, parts, tmp_path, granularity):
    start = tiny_checkpoint.write_run(tmp_path / "start", parts["base"], granularity)
    run, model = tmp_path / "run", start_model({**parts, "start": start})
    tune({**parts, "start": start}, run, granularity=granularity, learning_rate=0, max_steps=2)
    for step, line in enumerate(history(run)):
        batches = micro_batches(step)
        loss, task, penalty, capacity = by_hand(model, batches)
        assert (line["loss"], line["task_loss"]) == pytest.approx((loss.item(), task), abs=2e-5)
        assert {name: line[name] for name in capacity} == pytest.approx(capacity, abs=1e-6)
        assert line["capacity"] == pytest.approx(sum(capacity.values()) / len(capacity), abs=1e-6)
        assert line["penalty"] == pytest.approx(penalty, abs=1e-6)
        real = [int(batch["attention_mask"].sum()) for batch in batches]
        assert line["padding"] == pytest.approx(1 - sum(real) / sum(batch["labels"].numel() for batch in batches))
        assert 0 < line["capacity"] < 1, "mixed decisions, or this shows little"
    assert step == 1 and line["tokens_per_second"] > 0 and line["memory_gb"] > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_sgd_step_follows_the_gradient_of_that_loss(micro_batches, parts, tmp_path, smoothing):
    settings = {"optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.5, "label_smoothing_factor": smoothing}
    tune(parts, tmp_path, **settings, **ONE_STEP)
    model, trained = start_model(parts), routers(tmp_path)
    by_hand(model, micro_batches(0), smoothing=smoothing)[0].backward()
    for name in trained:
        weight = model.get_parameter(name)
        torch.testing.assert_close(trained[name], weight.detach() - 0.5 * weight.grad, rtol=1e-4, atol=2e-6)
        assert weight.grad.abs().max() > 1e-4


def test_routers_change_and_everything_else_stays_bit_equal(parts, tmp_path):
    tuned = tune(parts, tmp_path, **ONE_STEP)
    start = load_file(parts["base"] / "model.safetensors") | routers(parts["start"])
    for name, parameter in tuned.trainer.model.named_parameters():
        assert torch.equal(parameter, start[name]) == ("mod_router" not in name), name
        assert "mod_router" in name or parameter.grad is None


def test_a_checkpoint_holds_what_trains_and_little_else(finished):
    folder, names = finished / "checkpoint-6", set(routers(finished))
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert set(load_file(folder / "trainable.safetensors")) == set(moments) == names
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(next(iter(moments.values())))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_ends_with_the_same_bits_and_the_same_log(parts, finished, tmp_path, step):
    """Step 2 lies within the first epoch, step 4 in the second."""
    run = resume(parts, finished, step, tmp_path / "run")
    assert (run / "router.safetensors").read_bytes() == (finished / "router.safetensors").read_bytes()
    ours, theirs = history(run), history(finished)
    for line in [*ours, *theirs]:
        del line["tokens_per_second"], line["memory_gb"]
    assert ours == theirs


def test_dropout_draws_do_not_depend_on_interruptions(parts, tmp_path):
    settings = {"lora": True, "lora_dropout": 0.3, "num_train_epochs": 1, "router_dir": None}
    tune(parts, tmp_path / "whole", **settings)
    torch.manual_seed(123456)
    resume(parts, tmp_path / "whole", 1, tmp_path / "resumed", **settings)
    tune(parts, tmp_path / "dry", **{**settings, "lora_dropout": 0.0})
    names = ("whole", "resumed", "dry")
    whole, resumed, dry = ((tmp_path / n / "adapter/adapter_model.safetensors").read_bytes() for n in names)
    assert whole == resumed != dry, "and dropout does something"


def test_measured_capacity_is_that_of_the_saved_routers_at_inference(micro_batches, parts, finished):
    model, kept = start_model({**parts, "start": finished}).eval(), []
    for batch in [batch for step in range(3) for batch in micro_batches(step)]:
        with record_routing(model) as log, torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        kept.append(torch.stack(list(log.decisions.values())))
    assert record(finished)["reached_capacity"] == pytest.approx(torch.cat(kept, 1).float().mean().item(), abs=1e-6)


def test_gradient_checkpointing_changes_nothing(parts, finished, tmp_path):
    tune(parts, tmp_path, gradient_checkpointing=True)
    for name, expected in routers(finished).items():
        torch.testing.assert_close(routers(tmp_path)[name], expected, rtol=0, atol=1e-6)
