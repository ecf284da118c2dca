"""Runs the cells of an experiment: trains what is missing, scores it, one JSON each, any number of workers at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from router_tuning.evaluation import controls
from router_tuning.evaluation.cost import measure_cost
from router_tuning.evaluation.models import load_dense, load_tuned
from router_tuning.evaluation.rows import prompt_batches
from router_tuning.experiments.data import scored_items, scored_texts, search_rows, train_file
from router_tuning.experiments.masks import LENGTH, mask_table, static_masks
from router_tuning.experiments.plan import MATCH, OWN, Cell, Plan
from router_tuning.experiments.score import (
    answers_right,
    score_choices,
    score_generation,
    score_text,
    tokens_by_expert,
)
from router_tuning.files import write_json
from router_tuning.model import record_routing, route, routed_modules
from router_tuning.provenance import provenance
from router_tuning.tuning.arguments import ROOT
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.encoding import encode_conversation, load_tokenizer, render_prompt
from router_tuning.tuning.recipes.budget.recipe import in_batches
from router_tuning.tuning.recipes.budget.training import TrainSettings, training_with

_TIMED_PER_TASK = 16


class Laboratory:
    """The base, the data and the folders of a plan; :meth:`run` does one cell.

    Args:
        results: folder of the JSON files. work: folder of training data and trained routers.
    """

    def __init__(self, plan: Plan, results: Path, work: Path) -> None:
        self.plan, self.results, self.work = plan, results, work
        self.base = Path(plan.base) if Path(plan.base).is_absolute() else ROOT / plan.base

    # ---- bookkeeping

    def path(self, cell: Cell) -> Path:
        """Where the result of a cell lies."""
        return self.results / f"{cell.name}.json"

    def read(self, cell: Cell) -> dict[str, Any]:
        """The result of a cell that has run."""
        return json.loads(self.path(cell).read_text())

    def run(self, cell: Cell) -> bool:
        """Run a cell unless its result is there, another worker has it, or it needs one that is not there yet."""
        if self.path(cell).exists() or not self._ready(cell) or not self._claim(cell):
            return False
        try:
            started = time.perf_counter()
            kinds: dict[str, Callable[[Cell], dict[str, Any]]] = {
                "dense": self._dense,
                "masks": self._masks,
                "tune": self._tune,
                "score": self._score,
                "random": self._random,
                "static": self._static,
                "cost": self._cost,
            }
            found = kinds[cell.kind](cell)
            description = {"cell": vars(cell), **found, "seconds": round(time.perf_counter() - started, 1)}
            write_json(self.path(cell), {**description, "provenance": provenance()})
        finally:
            self._lock(cell).unlink(missing_ok=True)
        return True

    def _ready(self, cell: Cell) -> bool:
        if cell.kind == "cost" and cell.seed is None:
            return self.path(Cell("static", cell.recipe, cell.granularity)).exists()
        if cell.kind not in ("score", "cost"):
            return True
        needed = [Cell("tune", cell.recipe, cell.granularity, cell.seed)]
        if cell.capacity == MATCH:
            needed.append(self.published(cell))
        return all(self.path(other).exists() for other in needed)

    def published(self, cell: Cell) -> Cell:
        """The cell that scores the published recipe on the same granularity and seed."""
        other = next(name for name in self.plan.grid_recipes if not self.plan.has_dial(name))
        return Cell("score", other, cell.granularity, cell.seed, OWN)

    def _lock(self, cell: Cell) -> Path:
        return self.work / f"{cell.name}.lock"

    def _claim(self, cell: Cell) -> bool:
        lock = self._lock(cell)
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            try:
                os.kill(int(lock.read_text() or 0), 0)
                return False
            except (ProcessLookupError, ValueError, FileNotFoundError):
                lock.unlink(missing_ok=True)  # its worker was killed
                return self._claim(cell)
        os.write(handle, str(os.getpid()).encode())
        os.close(handle)
        return True

    # ---- data

    @cached_property
    def tokenizer(self) -> Any:
        """The base's."""
        return load_tokenizer(self.base)

    def held_out(self, count: int) -> dict[str, list[Any]]:
        """``count`` scored items of every task."""
        return scored_items(self.plan, count)

    def routed(self, granularity: str) -> PreTrainedModel:
        """The base, routed as the plan's runs are."""
        dense = load_dense(self.base, "float32")
        layers = len(dense.model.layers) // 2
        return route(dense, mod_n=layers, granularity=granularity, router_pooling="prompt").eval()

    # ---- cells

    def _scores(self, model: PreTrainedModel, under: Callable = nullcontext, full: bool = True) -> dict[str, Any]:
        with under():
            found = {"generation": score_generation(model, self.tokenizer, self.held_out(self.plan.items))}
        if full:
            with under():
                found["choices"] = score_choices(model, self.tokenizer, self.held_out(self.plan.choices))
            with under():
                found["text"] = score_text(model, self.tokenizer, scored_texts(self.plan))
        return found

    def _dense(self, _: Cell) -> dict[str, Any]:
        return self._scores(load_dense(self.base, "float32"))

    def _tune(self, cell: Cell) -> dict[str, Any]:
        from router_tuning.tuning.command_line import parse_command
        from router_tuning.tuning.interruption import Interruption
        from router_tuning.tuning.preparation import Preparation
        from router_tuning.tuning.tuning import run_tuning

        folder = self.run_folder(cell)
        flags = {
            "model_name_or_path": self.base,
            "train_file": train_file(self.plan, self.work, cell.recipe, cell.seed),
            "max_train_samples": 0,
            "granularity": cell.granularity,
            "max_seq_length": LENGTH,
            "seed": cell.seed,
            "output_dir": folder,
            "report_to": "none",
            "save_strategy": "no",
            **self.plan.recipes[cell.recipe],
        }
        argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        started = time.perf_counter()
        settings = TrainSettings(**self.plan.training.get(cell.recipe, {}))
        with training_with(settings):
            tuned = run_tuning(Preparation(parse_command([*argv, "--overwrite_output_dir"])), Interruption())
        if tuned.interrupted:
            raise KeyboardInterrupt
        record = json.loads((folder / "run.json").read_text())
        keys = ("target_capacity", "reached_capacity", "capacity_by_router", "steps", "seed")
        dial = json.loads((folder / "router_config.json").read_text()).get("dial")
        return {
            "run": {key: record[key] for key in keys},
            "flags": {name: str(value) for name, value in self.plan.recipes[cell.recipe].items()},
            "training": self.plan.training.get(cell.recipe, {}),
            "train_seconds": round(time.perf_counter() - started, 1),
            "dial": dial,
        }

    def run_folder(self, cell: Cell) -> Path:
        """Where a tuning run writes."""
        return self.work / Cell("tune", cell.recipe, cell.granularity, cell.seed).name

    def _score(self, cell: Cell) -> dict[str, Any]:
        capacity = cell.capacity
        if capacity == OWN:
            capacity = None
        elif capacity == MATCH:
            capacity = self.read(self.published(cell))["conversations"]["total"]
        model = load_tuned(self.base, self.run_folder(cell), capacity, "float32")
        full = cell.capacity == OWN or cell.capacity in self.plan.budgets  # else generation alone
        return {"requested": capacity, "conversations": self._reached(model), **self._scores(model, full=full)}

    @torch.no_grad()
    def _reached(self, model: PreTrainedModel) -> dict[str, Any]:
        """Capacity on whole held-out conversations with their right answers, decisions taken on the prompt.

        ``whole_answer`` is the share of answers that greedy decoding would give token by token, mean over tasks: what
        the mask table and its oracle count.
        """
        right, collate = [], Collator(self.tokenizer)
        with record_routing(model) as log:
            for items in self.held_out(self.plan.items).values():
                rows = [encode_conversation(item.messages, self.tokenizer, LENGTH) for item in items]
                hits = [answers_right(model, batch) for batch in in_batches(rows, collate, 64)]
                right.append(float(torch.cat(hits).float().mean()))
        found: dict[str, Any] = {str(key): value for key, value in log.capacity().items()}
        if experts := tokens_by_expert(log):
            found["experts"] = experts
        return {**found, "whole_answer": sum(right) / len(right)}

    def _random(self, cell: Cell) -> dict[str, Any]:
        model = self.routed(cell.granularity)
        seed = 1000 * cell.seed + round(100 * cell.capacity)
        return self._scores(model, lambda: controls.random_masks(model, cell.capacity, seed), full=False)

    def _static(self, cell: Cell) -> dict[str, Any]:
        """Fixed masks of a part by one method: scores at every size that a budget of the plan lies between."""
        model = self.routed(fixed_granularity(cell.granularity))
        keys = controls.routers_of(model)
        sizes = sorted(
            {size for b in self.plan.budgets for size in (int(b * len(keys)), -int(-b * len(keys) // 1))} - {0}
        )
        kept = static_masks(model, self.tokenizer, search_rows(self.plan), cell.recipe)
        found = {}
        for size in sizes:
            scores = score_generation_under(model, self, kept[size])
            found[str(size)] = {"kept": [f"{layer}.{part}" for layer, part in kept[size]], **scores}
        return {"routers": len(keys), "sizes": found, "method": cell.recipe}

    def _cost(self, cell: Cell) -> dict[str, Any]:
        """FLOPs, time and cache of prompts beside the dense base, both in turns in this process."""
        texts = [
            render_prompt({"messages": item.messages}, self.tokenizer)
            for items in self.held_out(_TIMED_PER_TASK).values()
            for item in items
        ]
        batches = prompt_batches(texts, self.tokenizer, 48)
        dense, under = load_dense(self.base, "float32"), nullcontext()
        if cell.seed is not None:
            model = load_tuned(self.base, self.run_folder(cell), cell.capacity, "float32")
        else:
            model = self.routed(fixed_granularity(cell.granularity))
            sizes = self.read(Cell("static", cell.recipe, cell.granularity))["sizes"]
            # The whole number of modules next above the budget: a mixture of two masks has no single time.
            size = str(-int(-cell.capacity * len(routed_modules(model)) // 1))
            kept = [(int(layer), part) for layer, part in (name.split(".") for name in sizes[size]["kept"])]
            under = controls.fixed(model, kept)
        with under:
            return {"cost": measure_cost(dense, model, batches, new_tokens=16, repeats=5)}

    def _masks(self, _: Cell) -> dict[str, Any]:
        """Every mask of attention at sequence level: exact match by task, and the bounds that follow."""
        held_out = self.held_out(self.plan.items)
        items = {task: [{"messages": item.messages} for item in found] for task, found in held_out.items()}
        budgets = sorted({*self.plan.budgets, *self.plan.dial})
        return mask_table(self.routed("attn_sequence"), self.tokenizer, search_rows(self.plan), items, budgets)


def fixed_granularity(part: str) -> str:
    """What a fixed mask of one or more parts is imposed on; experts have no sequence level."""
    return "+".join(f"{name}_{'token' if name == 'expert' else 'sequence'}" for name in part.split("+"))


def score_generation_under(model: PreTrainedModel, lab: Laboratory, kept: list) -> dict[str, Any]:
    """Exact match with a fixed mask."""
    with controls.fixed(model, kept):
        found = score_generation(model, lab.tokenizer, lab.held_out(lab.plan.items))
    return {"exact_match": found["exact_match"], "capacity": found["capacity"]["total"]}
