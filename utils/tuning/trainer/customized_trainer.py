"""The HF Trainer with the routing loss, statistics that cost no host sync, and checkpoints of what trains alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from router_tuning.files import publish
from router_tuning.model import RoutingLog, capacity_penalty, record_routing
from router_tuning.tuning.batching import StepOrder
from router_tuning.tuning.trainer import checkpoints, engine_state
from router_tuning.tuning.trainer.console import Lines
from router_tuning.tuning.trainer.engines import check_engine, enable_fsdp_on_cpu
from router_tuning.tuning.trainer.routing_statistics import RoutingStatistics


class RouterTrainer(Trainer):
    """Trains ``L_task + λ·Σ_layers ReLU(capacity_l - target)`` (paper equation 6).

    ``capacity_l`` is the executed share of a micro-batch. A step's gradient is that of the mean over its tokens (task)
    and over its micro-batches (penalty), on any number of processes and whatever computes the task loss.

    Args:
        target_capacity: target of the penalty.
        gradient_scale: its weight λ.
        order: the rows of each step; see :class:`~router_tuning.tuning.batching.StepOrder`.
        settings: what a run must share with a checkpoint to continue it.
    """

    def __init__(
        self,
        *args,
        target_capacity: float,
        gradient_scale: float,
        order: StepOrder,
        settings: Mapping[str, Any],
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        config = self.model.config
        config.mod_target_capacity, config.mod_gradient_scale = target_capacity, gradient_scale
        self.order, self.settings = order, settings
        self.statistics = RoutingStatistics(self.args.device)
        self._micro = (-1, 0)  # step under way, micro-batches of it seen by this process
        self._read_at = 0
        for shown in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown)
        self.add_callback(Lines)

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's accelerator, checked: what was launched is what runs."""
        super().create_accelerator_and_postprocess()
        if enable_fsdp_on_cpu(self.accelerator):
            self.is_fsdp_enabled = True
        check_engine(self.accelerator)

    # ---- loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """Task loss of a micro-batch plus its share of the penalty."""
        with record_routing(model) as log:
            loss, outputs = super().compute_loss(model, {**inputs, "penalty_weight": 0.0}, True, num_items_in_batch)
        if self.model.training:
            counted, penalty = num_items_in_batch is not None, capacity_penalty(model)
            self.note_losses(log, loss, penalty, inputs, counted)
            added = self.model.config.mod_gradient_scale * penalty
            loss = loss + (added / self.current_gradient_accumulation_steps if counted else added).to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def note_losses(
        self, log: RoutingLog, loss: Tensor, penalty: Tensor, inputs: dict[str, Any], counted: bool
    ) -> None:
        """Add a micro-batch to the statistics, with its share of the step's ``loss``.

        Args:
            counted: whether ``loss`` is divided by the tokens of the step. Without that count the Trainer itself
                divides the sum by the accumulation steps afterwards.
        """
        replicas = self.accelerator.num_processes
        parts = replicas if counted else self.current_gradient_accumulation_steps * replicas
        self.statistics.add(log, loss.detach() / parts, penalty, inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """One micro-batch; its random numbers depend on the seed and its place in the run, not on who computes it."""
        step, index = self._micro
        index = index + 1 if step == self.state.global_step else 0
        self._micro = (self.state.global_step, index)
        place = index * self.accelerator.num_processes + self.accelerator.process_index
        torch.manual_seed(hash((self.args.seed, self.state.global_step, place)) & (2**63 - 1))
        return super().training_step(model, inputs, num_items_in_batch)

    # ---- data and logs

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.order

    def _run_epoch(self, *args, epoch: int, **kwargs) -> None:
        # A dataloader that skips what a resumed run has seen hides its sampler from set_epoch.
        self.order.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add task loss, capacities, penalty and throughput to a training log line."""
        if "loss" in logs:
            logs |= self.statistics.read(self.state.global_step - self._read_at)
            self._read_at = self.state.global_step
        super().log(logs, start_time)

    # ---- checkpoints

    @property
    def deepspeed_engine(self) -> Any | None:
        """The DeepSpeed engine, if that is what trains."""
        return self.model_wrapped if self.is_deepspeed_enabled else None

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write what trains, optimizer, schedule, random state and position; the folder appears when all is there."""
        place = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.store_flos()
        with publish(place) if self.args.should_save else nullcontext() as draft:
            [folder] = broadcast_object_list([draft])
            folder.mkdir(parents=True, exist_ok=True)
            weights = engine_state.gather_weights(self.model)
            if self.deepspeed_engine is not None:
                self.deepspeed_engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
            else:
                moments = engine_state.gather_optimizer(self.model, self.optimizer)
                if self.args.should_save:
                    torch.save(moments, folder / engine_state.OPTIMIZER)
            self._save_rng_state(str(folder))
            self._save_scaler(str(folder))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                save_file(weights, folder / engine_state.WEIGHTS, metadata={"format": "pt"})
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
                for script in folder.glob("zero_to_*.py"):  # they merge whole models, which is not what lies here
                    script.unlink()
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                checkpoints.describe(folder, self.settings)
        if self.args.should_save:
            checkpoints.rotate(place.parent, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: weights are restored with the optimizer, when the engine has wrapped the model."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        return prepared

    def _restore(self, folder: Path) -> None:
        if self.deepspeed_engine is not None:
            found, _ = self.deepspeed_engine.load_checkpoint(str(folder), load_module_strict=False)
            if found is None:
                raise ValueError(f"{folder} holds no DeepSpeed state")
            engine_state.load_weights(self.model, folder / engine_state.WEIGHTS, frozen_only=True)
        else:
            engine_state.load_weights(self.model, folder / engine_state.WEIGHTS)
            engine_state.load_optimizer(self.model, self.optimizer, folder / engine_state.OPTIMIZER)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        self._load_scaler(str(folder))
        self._read_at = self.state.global_step

    # ---- results

    def measure_capacity(self, micro_batches: int) -> dict[str, float]:
        """Capacity of the routers as they are now, over ``micro_batches`` micro-batches per process, without learning.

        Runs densely with training's forward pass, whose decisions are those of inference: an engine that shards a
        module's weights would wait forever for a rank that skips it. Collective: every rank calls.
        """
        self.statistics.reset()
        self.order.set_epoch(0)
        loader = self.get_train_dataloader()
        self.current_gradient_accumulation_steps = 1
        self.model.train()
        for inputs in islice(loader, micro_batches):
            self.compute_loss(self.model_wrapped, self._prepare_inputs(inputs))
        return self.statistics.read(1)
