"""Tune the routers of a Mixture-of-Depths model.

    python entrypoints/finetune/finetune_mod.py --folder_name tiny-llama-mod --data_type alpaca
    python entrypoints/finetune/finetune_mod.py --folder_name mistral-7b-mod --mod_n 16 --target_capacity 0.5 --dry_run

``scripts/finetune_mod.sh`` starts it on one or many devices. Routers, settings and logs appear in
``trained_models/<base>/<data>/<knobs>``; ``--resume_from_checkpoint auto`` continues a run that was interrupted.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from router_tuning.errors import cli
from router_tuning.tuning.command.command_line import parse_command
from router_tuning.tuning.dry_run import dry_run
from router_tuning.tuning.run import Run
from router_tuning.tuning.trainer.console import set_up_logs
from router_tuning.tuning.trainer.interruption import StopOnSignal
from router_tuning.tuning.tuning import run_tuning

RANK = int(os.environ.get("RANK", 0))
EXIT_CODE_FILE = "ROUTER_TUNING_EXIT_CODE_FILE"
logger = logging.getLogger(__name__)


def main() -> None:
    """Check everything, then tune."""
    stop = StopOnSignal().install()
    set_up_logs(RANK)
    command = parse_command()
    for note in command.notes:
        logger.info(note)
    if command.training.dry_run:
        print(dry_run(command))
        return
    run = Run(command, stop)
    if command.training.check_inputs:
        return
    tuned = run_tuning(run)
    if stop.signal:
        logger.info(f"interrupted after step {tuned.trainer.state.global_step}; continue with RESUME=auto")
        raise SystemExit(128 + stop.signal)
    if RANK == 0:
        print(f"output: {run.output}")


def report_exit_code() -> None:
    """Run, and leave the exit code where the script that started the launcher finds it: launchers turn all into 1."""
    code: int | str | None = 1
    try:
        cli(main)
        code = 0
    except SystemExit as stop:
        code = stop.code
        raise
    finally:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and EXIT_CODE_FILE in os.environ:
            Path(os.environ[EXIT_CODE_FILE]).write_text(str(code))


if __name__ == "__main__":
    report_exit_code()
