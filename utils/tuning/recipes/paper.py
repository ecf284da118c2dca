"""The published recipe: task loss and capacity penalty through the straight-through gradient, one Trainer run."""

from __future__ import annotations

from router_tuning.tuning.batching import Collator, StepOrder
from router_tuning.tuning.customized_trainer import RouterTrainer
from router_tuning.tuning.interruption import StopOnSignal
from router_tuning.tuning.job import TunedRun, TuningJob

_MEASURED_ROWS = 256


def tune(job: TuningJob) -> TunedRun:
    """Train the job's model in place (He et al. 2024, section 3.3). Collective: every rank calls."""
    training, routing = job.training, job.command.routing
    trainer = RouterTrainer(
        model=job.model,
        args=training,
        train_dataset=job.data.rows,
        data_collator=Collator(job.tokenizer),
        callbacks=[StopOnSignal(job.interruption)],
        target_capacity=routing.target_capacity,
        gradient_scale=routing.gradient_scale,
        order=StepOrder(job.data.lengths, training.global_batch_size, training.seed, job.command.data.length_grouping),
        settings=job.settings,
    )
    trainer.train(resume_from_checkpoint=None if job.resume is None else str(job.resume))
    stopped = job.interruption.signal is not None
    return TunedRun(trainer=trainer, history=trainer.state.log_history, interrupted=stopped)


def measure(job: TuningJob, tuned: TunedRun) -> None:
    """Measure the capacity that the routers have reached. Collective: every rank calls."""
    rows = min(_MEASURED_ROWS, len(tuned.trainer.order))
    per_process = max(1, rows // (job.training.per_device_train_batch_size * job.training.world_size))
    tuned.measured = tuned.trainer.measure_capacity(per_process)
