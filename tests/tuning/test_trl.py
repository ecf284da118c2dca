"""Routers under TRL's trainers: SFT computes its loss outside the model, DPO loads an export twice."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import random_batch, tiny_model
from tiny_routed import LAYERS
from tiny_training import dense_answers, freeze_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.checkpoint.exporting import export
from router_tuning.model import record_routing, route

trl = pytest.importorskip("trl")


def mean_capacity(parts, folder, scale, peft, **settings):
    """Mean capacity of the last third of a run that starts from routers at zero, as the trainer sets it up itself."""
    tokenizer = AutoTokenizer.from_pretrained(parts["base"])
    model = tiny_model(vocab_size=len(tokenizer))
    ids, _ = random_batch(32, 12)
    rows = {"input_ids": ids.tolist(), "labels": dense_answers(model, ids).tolist()}
    route(model, mod_layers=LAYERS, gradient_scale=scale)
    adapter = LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["mod_router"], task_type="CAUSAL_LM")
    if not peft:
        freeze_base(model)
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=36, learning_rate=0.02, lr_scheduler_type="constant", report_to="none",
        use_cpu=True, save_strategy="no", logging_steps=100, bf16=False, disable_tqdm=True, max_grad_norm=0.0,
        gradient_checkpointing=False, max_length=None, **{"per_device_train_batch_size": 32, **settings},
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer,
        peft_config=adapter if peft else None,
    )  # fmt: skip
    with record_routing(trainer.model) as log:
        trainer.train()
    capacities = []
    for records in log.records.values():
        last = records[len(records) * 2 // 3 :]
        capacities.append(torch.stack([record.keep.float().mean() for record in last]).mean())
    return float(torch.stack(capacities).mean())


@pytest.mark.parametrize(
    ("scale", "peft", "settings", "capacity"),
    [
        (1.0, False, {"label_smoothing_factor": 0.1}, 0.5),
        (1.0, False, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 0.5),
        (1.0, True, {}, 0.5),
        (0.0, False, {}, 0.85),
    ],
    ids=["smoothed", "accumulated", "adapter", "no penalty"],
)
def test_capacity_goes_to_the_target_or_stays_open(parts, tmp_path, scale, peft, settings, capacity):
    assert mean_capacity(parts, tmp_path, scale, peft, **settings) == pytest.approx(capacity, abs=0.15)


def test_dpo_trains_an_export_against_a_reference_of_the_same_folder(parts, tmp_path):
    export(parts["start"], parts["base"], tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    before = {name: value.clone() for name, value in model.state_dict().items() if "mod_router" in name}
    rows = [{"prompt": "red blue", "chosen": f" {word} cat", "rejected": " one"} for word in ("sun", "moon", "tree")]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "dpo"), max_steps=2, learning_rate=0.01, per_device_train_batch_size=3,
        trust_remote_code=True, report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=freeze_base(model), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "export"),
    )  # fmt: skip
    trainer.train()
    after = trainer.model.state_dict()
    assert before and all(not torch.equal(after[name], value) for name, value in before.items())
    reference = trainer.ref_model.state_dict()
    assert all(torch.equal(reference[name], value) for name, value in before.items()), "the reference is routed, too"
