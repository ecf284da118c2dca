"""Runs many tunings in the processes of one launch, each under the engine that an accelerate config names.

    python -m torch.distributed.run --nproc_per_node 2 tests/engine_worker.py plan.json

Starting Python costs more than these runs do. The environment of each is the one that ``accelerate launch`` makes of
the config; between two runs accelerate, transformers and DeepSpeed forget what they were. ``plan.json`` is a list of
``{"config", "arguments", "copy": [[from, to], …]}``, ``config`` relative to the repository.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from router_tuning.tuning.command.command_line import parse_command
from router_tuning.tuning.run import Run
from router_tuning.tuning.trainer.console import set_up_logs
from router_tuning.tuning.tuning import run_tuning

ROOT = Path(__file__).resolve().parents[2]


def environment_of(config: str) -> dict[str, str]:
    """What ``accelerate launch --config_file`` puts into the environment of its processes."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(ROOT / config), "--num_processes", "2", "script.py"])
    args, *_ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_config_file = str(ROOT / args.deepspeed_config_file)
        args.deepspeed_fields_from_accelerate_config = "deepspeed_config_file,zero3_init_flag"
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def run(config: str, arguments: list[str]) -> None:
    """One tuning under one engine."""
    before = dict(os.environ)
    launched = environment_of(config)
    os.environ.update({k: v for k, v in launched.items() if k.startswith(("ACCELERATE_", "FSDP_"))})
    try:
        run_tuning(Run(parse_command(arguments)))
        dist.barrier()
    finally:
        os.environ.clear()
        os.environ.update(before)
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        unset_hf_deepspeed_config()
        gc.collect()


def main() -> None:
    """Run the plan."""
    rank = int(os.environ["RANK"])
    set_up_logs(rank)
    for item in json.loads(Path(sys.argv[1]).read_text()):
        if rank == 0:
            for source, target in item.get("copy", []):
                shutil.copytree(source, target)
        if dist.is_initialized():
            dist.barrier()
        run(item["config"], item["arguments"])


if __name__ == "__main__":
    main()
