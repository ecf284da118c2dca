"""The published recipe: task loss and capacity penalty through the straight-through gradient, one Trainer run."""

from __future__ import annotations

from router_tuning.tuning.run import Run, TunedRun
from router_tuning.tuning.trainer.customized_trainer import RouterTrainer

_MEASURED_ROWS = 256


def tune(run: Run) -> TunedRun:
    """Train the run's model in place (He et al. 2024, section 3.3). Collective: every rank calls."""
    trainer = RouterTrainer(**run.trainer_options, gradient_scale=run.routing.gradient_scale)
    trainer.train(resume_from_checkpoint=None if run.resume is None else str(run.resume))
    return TunedRun(trainer)


def measure(run: Run, tuned: TunedRun) -> None:
    """Measure the capacity that the routers have reached. Collective: every rank calls."""
    rows = min(_MEASURED_ROWS, len(tuned.trainer.order))
    per_process = max(1, rows // (run.training.per_device_train_batch_size * run.training.world_size))
    tuned.measured = tuned.trainer.measure_capacity(per_process)
