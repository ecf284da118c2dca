"""SIGTERM and SIGINT: all ranks stop at the same micro-batch, save, and exit with a code that schedulers know."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)
_PATIENCE = 3.0  # seconds; a second signal later than this ends the process at once


class StopOnSignal(TrainerCallback):
    """Stops every rank as soon as one was signalled, after the micro-batch under way.

    The gradients of an unfinished step are dropped: the checkpoint is that of the last finished step. Before and after
    training a signal ends the process, except one that has just been served.

    Attributes:
        signal: the first that arrived while training, on any rank; 0: none.
    """

    def __init__(self) -> None:
        self.signal, self.since, self.training, self.saved_step = 0, 0.0, False, 0
        self.group: dist.ProcessGroup | None = None

    def install(self) -> StopOnSignal:
        """Handle signals from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # Launchers and terminals deliver the same signal twice within moments: that is one wish.
        if not self.training or (self.signal and now - self.since > _PATIENCE):
            logger.info("interrupted; RESUME=auto goes on from the newest checkpoint, without one from the beginning")
            raise SystemExit(128 + number)
        if not self.signal:
            self.signal, self.since = number, now

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """From here a signal waits for the micro-batch under way. Collective."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # A group of its own on the CPU: asking costs no synchronisation with the GPU.
            self.group = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)
        self.training, self.saved_step = True, state.global_step

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Between micro-batches and steps."""
        if self.group is not None:
            flag = torch.tensor([self.signal])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            self.signal = int(flag)
        if self.signal:
            control.should_training_stop = True
            control.should_save = state.global_step > self.saved_step
        return control

    on_step_end = on_substep_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Nothing is saved twice."""
        self.saved_step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """A signal ends the process again, except the one that has just been served."""
        self.training = bool(self.signal)
