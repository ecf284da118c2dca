"""The published recipe: task loss and capacity penalty through the straight-through gradient, one Trainer run."""

from __future__ import annotations

from router_tuning.tuning.batching import StepOrder
from router_tuning.tuning.run import Run, TunedRun
from router_tuning.tuning.trainer.customized_trainer import RouterTrainer
from router_tuning.tuning.trainer.interruption import StopOnSignal

_MEASURED_ROWS = 256


def tune(run: Run) -> TunedRun:
    """Train the run's model in place (He et al. 2024, section 3.3). Collective: every rank calls."""
    training, routing = run.training, run.routing
    trainer = RouterTrainer(
        model=run.model,
        args=training,
        train_dataset=run.data.rows,
        data_collator=run.collator,
        callbacks=[StopOnSignal(run.interruption)],
        target_capacity=routing.target_capacity,
        gradient_scale=routing.gradient_scale,
        order=StepOrder(run.data.lengths, training.global_batch_size, training.seed, run.command.data.length_grouping),
        settings=run.settings,
    )
    trainer.train(resume_from_checkpoint=None if run.resume is None else str(run.resume))
    stopped = run.interruption.signal is not None
    return TunedRun(trainer=trainer, history=trainer.state.log_history, interrupted=stopped)


def measure(run: Run, tuned: TunedRun) -> None:
    """Measure the capacity that the routers have reached. Collective: every rank calls."""
    rows = min(_MEASURED_ROWS, len(tuned.trainer.order))
    per_process = max(1, rows // (run.training.per_device_train_batch_size * run.training.world_size))
    tuned.measured = tuned.trainer.measure_capacity(per_process)
