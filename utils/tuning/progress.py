"""One short line per log: what a user watches; everything else goes to TensorBoard and the run's files."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

SHOWN = {
    "loss": "loss {:.4f}",
    "task_loss": "task {:.4f}",
    "penalty": "penalty {:.4f}",
    "capacity": "capacity {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:.0f} tokens/s",
    "memory_gb": "{:.1f} GB",
}


class CompactProgress(ProgressCallback):
    """The Trainer's progress bar with one line per log."""

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Write step, losses, capacity, learning rate and throughput."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        shown = [text.format(logs[name]) for name, text in SHOWN.items() if name in logs]
        line = f"step {state.global_step}/{state.max_steps}  " + "  ".join(shown)
        tqdm.write(line)


class CompactPrinter(PrinterCallback):
    """The same line without a bar."""

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Write the line."""
        CompactProgress.on_log(self, args, state, control, logs, **kwargs)


def use_compact_progress(trainer: Trainer) -> None:
    """Replace the Trainer's own display: a bar on a terminal, lines alone in a file."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, (ProgressCallback, PrinterCallback)):
            trainer.remove_callback(type(callback))
    plain = trainer.args.disable_tqdm or not sys.stderr.isatty()
    trainer.add_callback(CompactPrinter if plain else CompactProgress)
