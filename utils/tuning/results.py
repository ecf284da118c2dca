"""What a run leaves: what it learnt, and the record of how."""

from __future__ import annotations

import json
import logging
from typing import Any

from peft import PeftModel

from router_tuning.files import publish, write_json, write_text
from router_tuning.model import save_routers
from router_tuning.provenance import provenance
from router_tuning.tuning.engines import running
from router_tuning.tuning.routing_statistics import CAPACITY
from router_tuning.tuning.run import Run, TunedRun
from router_tuning.tuning.run_folder import TEMPLATE, write_results
from router_tuning.tuning.tuning_data import tokenizer_hash

logger = logging.getLogger(__name__)
_TOLERANCE = 0.05  # a reached capacity further than this from its target is worth a warning


def save_trained(run: Run, tuned: TunedRun) -> None:
    """Routers always; the adapter, or the whole model, where it trained; and the record. Collective."""
    tuned.weights = tuned.trainer.gather_trained()
    if run.training.should_save:
        model = tuned.model
        if isinstance(model, PeftModel):
            options = {"state_dict": tuned.weights, "save_embedding_layers": False}
            with publish(run.output / "adapter") as folder:
                model.save_pretrained(folder, **options)
        elif run.routing.trains == "full":
            with publish(run.output / "model") as folder:
                model.save_pretrained(folder, state_dict=tuned.weights)
                run.tokenizer.save_pretrained(folder)
        write_text(run.output / TEMPLATE, run.tokenizer.chat_template)
    save_measured(run, tuned)


def save_measured(run: Run, tuned: TunedRun) -> None:
    """Routers with their thresholds and calibration, and the record with what was measured. Collective."""
    if run.training.should_save:
        routing = {name: value for name, value in tuned.weights.items() if "mod_router" in name or "mod_skip" in name}
        routers = {_router_name(name): value for name, value in routing.items()}
        save_routers(tuned.model, run.output, state=routers, extra={**tuned.extra, "base": run.base_fingerprint})
        if (config := run.output / "model" / "config.json").is_file():  # calibration has moved the thresholds
            threshold = {"mod_threshold": tuned.model.config.mod_threshold}
            write_json(config, json.loads(config.read_text(encoding="utf-8")) | threshold)
        write_results(run.output, record_of(run, tuned), tuned.history)
        reached, asked = tuned.measured.get(CAPACITY), run.routing
        if reached is not None and abs(reached - asked.target_capacity) > _TOLERANCE:
            logger.warning(missed_target(reached, asked.target_capacity, asked.recipe))
    tuned.trainer.barrier()


def record_of(run: Run, tuned: TunedRun) -> dict[str, Any]:
    """What ``run.json`` says of a run; every path in it is absolute."""
    losses = [row for row in tuned.history if "loss" in row]
    return {
        "arguments": run.command.values(),
        **provenance(),
        "base": {"path": str(run.base.absolute()), "fingerprint": run.settings["base"]},
        "data": {
            "path": str(run.data.raw.path.absolute()),
            "rows": len(run.data.rows),
            "left_out": run.data.left_out,
            "sha256": run.data.raw.sha256,
        },
        "tokenizer": {
            "name": run.command.model.tokenizer_name,
            "chat_template": run.command.data.chat_template,
            "sha256": tokenizer_hash(run.tokenizer),
        },
        "seed": run.training.seed,
        "world_size": run.training.world_size,
        "engine": running(tuned.trainer.accelerator),
        "steps": tuned.trainer.state.global_step,
        "skip_explained": run.skip_explained,
        "target_capacity": run.routing.target_capacity,
        "reached_capacity": tuned.measured.get(CAPACITY),
        "capacity_by_router": {k: v for k, v in tuned.measured.items() if k.startswith(f"{CAPACITY}_layer")},
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }


def missed_target(reached: float, target: float, recipe: str) -> str:
    """What to tell a user whose routers run more or less than was asked for."""
    told = f"reached capacity {reached:.3f}, target {target:g}"
    if recipe == "paper":
        return f"{told}: recipe 'paper' does not hold a run to its target; --recipe budget (RECIPE=budget) does"
    return f"{told}: report the reached value; more data to calibrate on brings it closer (MAX_TRAIN_SAMPLES)"


def _router_name(name: str) -> str:
    """A router's name in a peft model → its name in a checkpoint of the routed model."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
