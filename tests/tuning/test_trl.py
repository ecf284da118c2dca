"""Routers under TRL's trainers: SFT computes its loss outside the model, DPO loads an export twice."""

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
OPTIONS = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
OPTIONS |= {"gradient_checkpointing": False}
SFT = {"max_steps": 36, "learning_rate": 0.02, "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_length": None}
CUT = {"label_smoothing_factor": 0.1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("scale", "peft", "settings", "capacity"),
    [(1.0, False, CUT, 0.5), (1.0, True, {}, 0.5), (0.0, False, {}, 0.85)],
    ids=["smoothed and accumulated", "adapter", "no penalty"],
)
def test_capacity_goes_to_the_target_or_stays_open(parts, tmp_path, scale, peft, settings, capacity):
    """Of the last third of a run that starts from routers at zero, as the trainer sets it up itself."""
    tokenizer = AutoTokenizer.from_pretrained(parts["base"])
    model, (ids, _) = tiny_model(vocab_size=len(tokenizer)), random_batch(32, 12)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": dense_answers(model, ids).tolist()})
    route(model, mod_layers=LAYERS, gradient_scale=scale)
    adapter = LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["mod_router"], task_type="CAUSAL_LM")
    if not peft:
        freeze_base(model)
    arguments = trl.SFTConfig(str(tmp_path), **{"per_device_train_batch_size": 32, **OPTIONS, **SFT, **settings})
    given = {"processing_class": tokenizer, "peft_config": adapter if peft else None}
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, **given)
    with record_routing(trainer.model) as log:
        trainer.train()
    last = [record.keep.float() for found in log.records.values() for record in found[len(found) * 2 // 3 :]]
    assert torch.cat(last).mean().item() == pytest.approx(capacity, abs=0.15)


def test_dpo_trains_an_export_against_a_reference_of_the_same_folder(parts, tmp_path):
    export(parts["start"], parts["base"], tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    before = {name: value.clone() for name, value in model.state_dict().items() if "mod_router" in name}
    rows = [{"prompt": "red blue", "chosen": f" {word} cat", "rejected": " one"} for word in ("sun", "moon", "tree")]
    few = {"max_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 3, "trust_remote_code": True}
    arguments = trl.DPOConfig(str(tmp_path / "dpo"), **OPTIONS, **few)
    given = {"processing_class": AutoTokenizer.from_pretrained(tmp_path / "export"), "args": arguments}
    trainer = trl.DPOTrainer(model=freeze_base(model), train_dataset=Dataset.from_list(rows), **given)
    trainer.train()
    after, reference = trainer.model.state_dict(), trainer.ref_model.state_dict()
    assert before and all(not torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(reference[name], value) for name, value in before.items()), "the reference is routed, too"
