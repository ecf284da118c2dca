"""Logs that a person reads: our own lines from the first process, warnings of libraries that ask for an action."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import datasets
import transformers
from tqdm import tqdm

_NOISY = ("deepspeed", "DeepSpeed", "accelerate", "torch.distributed", "torch.utils.cpp_extension", "httpx", "fsspec")
_UNINFORMATIVE = (
    r".*`use_cache=True` is incompatible.*",
    r".*barrier\(\): using the device under current context.*",
    r".*find_unused_parameters=True was specified.*",
    r".*FSDP\.state_dict_type.*",
    r".*pin_memory.*no accelerator.*",
    r".*You are using the default legacy behaviour.*",
)


class _Lines(logging.Handler):
    """Writes through tqdm, so that a progress bar stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def quieten(rank: int) -> None:
    """Show INFO of this repository on rank 0, warnings of others there, errors alone elsewhere; call once, early."""
    own = logging.getLogger("router_tuning")
    for logger in (own, logging.getLogger("__main__")):
        logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
        logger.handlers, logger.propagate = [_Lines()], False
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
