"""What a person reads of a run: our own lines from the first process, warnings that ask for an action, a line per log.

Everything else goes to TensorBoard and the run's files.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from typing import Any

import datasets
import transformers
from transformers.trainer_callback import PrinterCallback

from router_tuning.tuning.duration import in_words

_NOISY = ("deepspeed", "DeepSpeed", "accelerate", "torch.distributed", "torch.utils.cpp_extension", "httpx", "fsspec")
_UNINFORMATIVE = (
    r".*`use_cache=True` is incompatible.*",
    r".*barrier\(\): using the device under current context.*",
    r".*find_unused_parameters=True was specified.*",
    r".*FSDP\.state_dict_type.*",
    r".*pin_memory.*no accelerator.*",
    r".*You are using the default legacy behaviour.*",
)


class _Plain(logging.Formatter):
    """The message alone, with its level where that asks for attention."""

    def format(self, record: logging.LogRecord) -> str:
        return ("" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: ") + record.getMessage()


def set_up_logs(rank: int) -> None:
    """Show INFO of this repository on rank 0, warnings of others there, errors alone elsewhere; call once, early."""
    own = logging.getLogger("router_tuning")
    for logger in (own, logging.getLogger("__main__")):
        logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain())
        logger.handlers, logger.propagate = [handler], False
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if rank else "true")
    transformers.logging.set_verbosity(transformers.logging.WARNING if rank == 0 else transformers.logging.ERROR)
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for message in _UNINFORMATIVE:
        warnings.filterwarnings("ignore", message=message)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    if rank:
        warnings.filterwarnings("ignore")


SHOWN = {
    "loss": "loss {:.4f}",
    "task_loss": "task {:.4f}",
    "penalty": "penalty {:.4f}",
    "capacity": "capacity {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:.0f} tokens/s",
    "memory_gb": "{:.1f} GB",
}


class Lines(PrinterCallback):
    """A line per log in place of the Trainer's dictionary and bar."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Note when the first step of this process began."""
        self.began = getattr(self, "began", (time.perf_counter(), state.global_step))

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        """Write step, losses, capacity, learning rate, throughput and the time left."""
        if state.is_world_process_zero and logs and "loss" in logs:
            shown = [text.format(logs[name]) for name, text in SHOWN.items() if name in logs]
            if left := state.max_steps - state.global_step:
                since, first = self.began
                shown.append(in_words(left * (time.perf_counter() - since) / (state.global_step - first)) + " left")
            sys.stdout.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(shown) + "\n")
            sys.stdout.flush()
