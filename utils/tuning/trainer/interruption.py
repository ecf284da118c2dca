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


class Interruption:
    """Remembers the first signal; before and after training, and on a second one, a signal ends the process."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.training = False
        self.since = 0.0

    def install(self) -> Interruption:
        """Handle SIGTERM and SIGINT from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells and schedulers count."""
        return 128 + (self.signal or 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # Launchers and terminals deliver the same signal twice within moments: that is one wish.
        if not self.training or (self.signal is not None and now - self.since > _PATIENCE):
            logger.info("interrupted; RESUME=auto goes on from the newest checkpoint, without one from the beginning")
            raise SystemExit(128 + number)
        if self.signal is None:
            self.signal, self.since = number, now


class StopOnSignal(TrainerCallback):
    """Stops every rank as soon as one was signalled, after the micro-batch under way.

    The gradients of an unfinished step are dropped: the checkpoint is that of the last finished step.
    """

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption
        self.group: dist.ProcessGroup | None = None
        self.saved_step = 0

    def _agree(self, state: TrainerState, control: TrainerControl) -> TrainerControl:
        number = self.interruption.signal or 0
        if self.group is not None:
            flag = torch.tensor([number])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            number = int(flag)
        if number:
            self.interruption.signal = number
            control.should_training_stop = True
            control.should_save = state.global_step > self.saved_step
        return control

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """From here a signal waits for the micro-batch under way. Collective."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # A group of its own on the CPU: asking costs no synchronisation with the GPU.
            self.group = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)
        self.interruption.training = True
        self.saved_step = state.global_step

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Between micro-batches."""
        return self._agree(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Between steps."""
        return self._agree(state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Nothing is saved twice."""
        self.saved_step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """A signal ends the process again, except the one that has just been served."""
        self.interruption.training = self.interruption.signal is not None
