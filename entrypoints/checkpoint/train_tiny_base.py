"""Train the embedded base model from scratch on the generator's training split, and write its checkpoint.

    python entrypoints/checkpoint/train_tiny_base.py                    # train, write ckpt/tiny-llama-mod
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 entrypoints/checkpoint/train_tiny_base.py    # two CPU cores
    python entrypoints/checkpoint/train_tiny_base.py --num_experts 4    # a small mixture of experts, its own folder
An interrupted run continues from its last checkpoint in --work_dir. On busy CPU cores two processes of one thread are
much faster than one process of two: threads that spin at a barrier wait for each other.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    get_wsd_schedule,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from router_tuning.embedded.base_training import (
    CURRICULUM,
    SampleStream,
    build_tokenizer,
    tiny_config,
    tiny_moe_config,
    write_checkpoint,
)
from router_tuning.embedded.muon import MuonWithAdamW
from router_tuning.errors import UserError, at_least, cli, parser_of
from router_tuning.places import ROOT
from router_tuning.tuning.batching import Collator

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
MATRICES, OTHERS = 4e-3, 2e-3
"""Learning rates: of matrices (Muon), and of embeddings and norms (AdamW)."""
DECAY = 0.8
"""Last share of the steps, with falling rate."""


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--output_dir", type=Path, help="default: ckpt/tiny-llama-mod, experts: trained_models/tiny-moe"
    )
    parser.add_argument("--work_dir", type=Path, help="default: trained_models/tiny-llama-base or tiny-moe-base")
    parser.add_argument("--num_experts", type=int, default=0, help="per MLP, two of them per token; 0: a dense Llama")
    parser.add_argument("--curriculum_at", type=int, default=CURRICULUM[1][0], help="step of its second half")
    parser.add_argument("--max_steps", type=at_least(1), default=7500)
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="items per step, over all processes")
    parser.add_argument("--save_steps", type=at_least(1), default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.batch_size % WORLD:
        raise UserError(f"--batch_size {args.batch_size} cannot be split over {WORLD} processes")
    if args.num_experts == 1 or args.num_experts < 0:
        raise UserError(f"--num_experts must be 0 (a dense Llama) or at least 2, not {args.num_experts}")
    kind, place = ("moe", "trained_models/tiny-moe") if args.num_experts else ("llama", "ckpt/tiny-llama-mod")
    args.output_dir = args.output_dir or ROOT / place
    args.work_dir = args.work_dir or ROOT / f"trained_models/tiny-{kind}-base"
    return args


def train(args: argparse.Namespace) -> tuple[PreTrainedModel, list[dict]]:
    """Train from scratch, or from the last checkpoint; returns the model and the Trainer's log.

    Every process reads the whole stream and keeps its own part of each batch.
    """
    last = get_last_checkpoint(str(args.work_dir)) if args.work_dir.is_dir() else None
    tokenizer = build_tokenizer()
    set_seed(args.seed)
    if last:  # the Trainer reads a checkpoint under its file's names, which for experts are not those of the module
        model = AutoModelForCausalLM.from_pretrained(last)
    elif args.num_experts:
        model = MixtralForCausalLM(tiny_moe_config(len(tokenizer), args.num_experts))
    else:
        model = LlamaForCausalLM(tiny_config(len(tokenizer)))
    optimizer = MuonWithAdamW(model.named_parameters(), MATRICES, OTHERS)
    decay = int(args.max_steps * DECAY)
    schedule = get_wsd_schedule(
        optimizer,
        num_warmup_steps=min(100, args.max_steps - decay),
        num_decay_steps=decay,
        num_training_steps=args.max_steps,
        decay_type="1-sqrt",
        min_lr_ratio=0.02,
    )
    settings = TrainingArguments(
        output_dir=str(args.work_dir),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size // WORLD,
        logging_steps=50,
        save_steps=args.save_steps,
        save_total_limit=2,
        seed=args.seed,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"dispatch_batches": False},
    )
    pad, curriculum = Collator(tokenizer), (CURRICULUM[0], (args.curriculum_at, CURRICULUM[1][1]))

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {name: values for name, values in pad(rows).items() if name != "prompt_length"}  # of routed models

    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=SampleStream(tokenizer, curriculum, args.batch_size, args.seed),
        data_collator=collate,
        optimizers=(optimizer, schedule),
    )
    trainer.train(resume_from_checkpoint=last)
    return model, trainer.state.log_history


def main() -> None:
    args = parse_args()
    model, log = train(args)
    if not int(os.environ.get("RANK", "0")):
        facts = {name: value for name, value in vars(args).items() if isinstance(value, int)}
        write_checkpoint(args.output_dir, model.cpu(), log, facts | {"world_size": WORLD})
        print(f"output: {args.output_dir}; evaluate_mod.py --base scores it")


if __name__ == "__main__":
    cli(main)
