"""Runs the cells of an experiment: trains what is missing, scores it, appends a record each to the plan's file."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.checkpoint.loading import load_dense, load_tuned
from router_tuning.errors import UserError
from router_tuning.evaluation.controls import Removed, random_masks, removal_order, removed
from router_tuning.evaluation.documents import Document, prompt_batches, read_documents, read_rows, rendered
from router_tuning.evaluation.records import Record, cell_name
from router_tuning.evaluation.scoring import Benchmark, score, scored_parts
from router_tuning.evaluation.tasks import requested_tokens
from router_tuning.evaluation.texts import batches_of, vocabulary
from router_tuning.experiments.plan import Cell, Plan
from router_tuning.files import append_json, read_json_lines, write_json
from router_tuning.model import ModConfig, fit_skip_paths, route
from router_tuning.model.saving import read_router_config
from router_tuning.places import SHIPPED
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.duration import in_words, reading_rate
from router_tuning.tuning.encoding import load_tokenizer
from router_tuning.tuning.run_folder import read_run

FINETUNE = SHIPPED / "entrypoints" / "finetune" / "finetune_mod.py"
logger = logging.getLogger(__name__)


class OutOfReach(UserError):
    """A budget that a policy cannot be turned to."""


class Laboratory:
    """The base, the data and the files of a plan.

    Args:
        results: the plan's JSON-lines file. work: folder of trained routers and of what is found on the way.

    Raises:
        UserError: where a file of the plan is not there.
    """

    def __init__(self, plan: Plan, results: Path, work: Path) -> None:
        self.plan, self.results, self.work = plan, results, work
        self.base = plan.path(plan.base)
        for place in (plan.base, plan.data, *(text.file for text in plan.texts.values())):
            if not plan.path(place).exists():
                raise UserError(f"experiment {plan.name}: {plan.path(place)} is not there; see the head of its file")
        self._removables: dict[tuple[str, int], PreTrainedModel] = {}

    def done(self) -> dict[str, Record]:
        """Records by cell, made with the plan's present settings."""
        records = {cell_name(record["cell"]): record for record in read_json_lines(self.results)}
        wanted = {cell.name: self.plan.fingerprint(cell) for group in self.plan.groups() for cell in group}
        return {name: r for name, r in records.items() if r.get("settings") == wanted.get(name, "")}

    def run(self, groups: Sequence[Sequence[Cell]]) -> None:
        """Do what is missing of some groups of cells, and say how far it is.

        A cell whose budget its routers cannot reach is recorded as refused, with the reason.
        """
        missing = self.missing(groups)
        with tqdm(total=len(missing), desc=self.plan.name, unit="cell") as progress:
            for cell in missing:
                progress.set_postfix_str(cell.name)
                if cell.name in self.done():  # another process was faster
                    continue
                started = time.perf_counter()
                try:
                    record = self._score(cell)
                except OutOfReach as error:
                    logger.warning("%s: %s", cell.name, error)
                    record = {"cell": vars(cell), "refused": str(error)}
                seconds = round(time.perf_counter() - started, 1)
                append_json(self.results, {**record, "settings": self.plan.fingerprint(cell), "cell_seconds": seconds})
                progress.update()

    def missing(self, groups: Sequence[Sequence[Cell]]) -> list[Cell]:
        """Cells of some groups that are not done, in their order."""
        done = self.done()
        return [cell for group in groups for cell in group if cell.name not in done]

    def estimate(self, groups: Sequence[Sequence[Cell]]) -> str:
        """How long the missing cells may take: the tokens that they read, at the speed of a few."""
        cells, plan = self.missing(groups), self.plan
        if not cells:
            return "nothing is missing"
        rate = reading_rate(self.dense)
        tokens = requested_tokens(plan.tasks, plan.documents, self.tokenizer, plan.num_fewshot)
        tokens = len(cells) * (tokens + 2 * sum(map(token_count, self.benchmark.texts.values())))
        looks = 2 * self.dense.config.get_text_config().num_hidden_layers * (1 + plan.candidates // 4)
        searches = len({cell.policy for cell in cells if cell.policy.startswith("static")})
        tokens += searches * looks * token_count(self._search_documents())
        runs = len({(cell.recipe, cell.granularity, cell.seed) for cell in cells if cell.policy == "routed"})
        told = f"{len(cells)} cells at {rate:.0f} tokens a second: about {in_words(tokens / rate)}"
        return f"{told}, beside {runs} tuning runs, which tell their own time"

    # ---- what cells are scored on

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's."""
        return load_tokenizer(self.base)

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The base."""
        return load_dense(self.base, self.plan.dtype)

    @cached_property
    def benchmark(self) -> Benchmark:
        """What every cell is scored on."""
        plan, prompts = self.plan, []
        texts = {}
        for name, text in plan.texts.items():
            size = (text.documents, text.max_tokens, text.first)
            texts[name] = read_documents(plan.path(text.file), self.tokenizer, *size)
        if plan.timed:
            rows = read_rows(plan.path(plan.texts[plan.timed].file))[plan.texts[plan.timed].first :]
            shown = [text for _, text in rendered(rows[: plan.timed_prompts], self.tokenizer)]
            prompts = prompt_batches(shown, self.tokenizer, plan.batch_size)
        evaluation = {"limit": plan.documents, "batch_size": plan.batch_size, "num_fewshot": plan.num_fewshot}
        timing = {"new_tokens": plan.new_tokens, "repeats": plan.repeats}
        return Benchmark(plan.tasks, evaluation, texts, prompts, timing)

    def _score(self, cell: Cell) -> Record:
        policy, _, kind = cell.policy.partition("_")
        parts = self._controlled(cell) if policy in ("random", "static") else {}
        if policy == "static":
            skip = kind, self.plan.recipes[cell.recipe or ""].get("skip_rank", ModConfig().skip_rank)
            model, order = self._removable(*skip), self._order(*skip, min(part["share"] for part in parts.values()))
        else:
            model = self.dense if policy == "dense" else self._routed(cell)

        def under(name: str) -> AbstractContextManager:
            if policy == "random":
                return random_masks(model, parts[name]["capacity"], cell.seed or 0)
            return removed(model, order, parts[name]["share"]) if policy == "static" else nullcontext()

        timed = policy in ("routed", "static") and cell.seed == self.plan.seeds[0]
        return score(self.benchmark, self.dense, model, self.tokenizer, vars(cell), under, timed)

    # ---- policies

    def _routed(self, cell: Cell) -> PreTrainedModel:
        run = self.trained(cell)
        lowest = read_router_config(run).get("dial", {}).get("flops", [0.0])[0]
        if cell.budget is not None and cell.budget < lowest:
            raise OutOfReach(f"{lowest:.3f} of the decoder's operations is left where its routers skip all")
        return load_tuned(self.base, run, flops=cell.budget, dtype=self.plan.dtype)

    def _controlled(self, cell: Cell) -> dict[str, Any]:
        """What the routed cell that a control stands beside ran and left of every task and text."""
        ours = Cell("routed", cell.recipe, cell.granularity, cell.seed, cell.budget)
        record = self.done().get(ours.name)
        if record is None:
            raise UserError(f"{cell.name} is a control of {ours.name}, which has not run: name it with --only")
        if "refused" in record:
            raise OutOfReach(record["refused"])
        return scored_parts(record)

    def trained(self, cell: Cell) -> Path:
        """Folder of a cell's tuning run, which is made, continued or found there.

        Raises:
            UserError: if the run fails; what it said stands above.
        """
        flags = {"train_file": self.plan.data, "report_to": "none", "dtype": self.plan.dtype, "seed": cell.seed}
        flags |= self.plan.recipes[cell.recipe or ""] | {"granularity": cell.granularity}
        name = f"{cell.recipe}__{cell.granularity}__seed{cell.seed}__{_mark([self.plan.base, flags])}"
        folder = self.work / name
        if read_run(folder).get("reached_capacity") is None:  # recorded at the very end, when all is calibrated
            flags |= {"model_name_or_path": self.base, "train_file": self.plan.path(flags["train_file"])}
            flags |= {"output_dir": folder} | ({"resume_from_checkpoint": "auto"} if folder.exists() else {})
            options = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
            command = [sys.executable, str(FINETUNE), *options]
            if subprocess.run(command).returncode:
                raise UserError(f"tuning failed, see above: {' '.join(command)}")
        return folder

    def _removable(self, kind: str, rank: int) -> PreTrainedModel:
        """The base, routed so that any module can be removed for an input, with skip paths in their places."""
        if (kind, rank) not in self._removables:
            dense = load_dense(self.base, self.plan.dtype)
            layers = list(range(dense.config.get_text_config().num_hidden_layers))
            model = route(dense, mod_layers=layers, granularity=self.plan.removable, router_pooling="prompt").eval()
            if kind != "zero":
                found = batches_of(self._search_documents(fit=True), Collator(self.tokenizer), vocabulary(model))
                try:
                    inputs = [{name: batch[name] for name in ("input_ids", "attention_mask")} for _, batch in found]
                    fit_skip_paths(model, inputs, kind, rank)
                except ValueError as error:
                    raise UserError(f"{self.plan.data}, behind the {self.plan.search_tokens} tokens that removal is "
                                    f"chosen on: {error}") from None  # fmt: skip
            self._removables[kind, rank] = model
        return self._removables[kind, rank]

    def _search_documents(self, fit: bool = False) -> list[Document]:
        """The first rows of the training data with ``search_tokens``, or those behind them with ``fit_tokens``."""
        plan, tokens = self.plan, 0
        found: tuple[list[Document], list[Document]] = ([], [])
        for document in read_documents(plan.path(plan.data), self.tokenizer, 4000, 256):
            found[tokens >= plan.search_tokens].append(document)
            tokens += len(document["input_ids"])
            if tokens >= plan.search_tokens + fit * plan.fit_tokens:
                break
        return found[fit]

    def _order(self, kind: str, rank: int, share: float) -> list[Removed]:
        """Modules in the order of their removal, at least until ``share`` is left; found once."""
        plan, documents = self.plan, self._search_documents()
        chosen_by = [plan.base, plan.granularities, plan.candidates, plan.fit_tokens, rank, documents]
        path = self.work / f"removal__{kind}__{_mark(chosen_by)}.json"
        order = json.loads(path.read_text()) if path.is_file() else []
        if not order or order[-1][-1] > share:
            # Some texts run less of a policy than others: a little further, so that it need not be found twice.
            model, lowest = self._removable(kind, rank), min([share, *plan.budgets]) - 0.05
            order = removal_order(self.dense, model, documents, Collator(self.tokenizer), lowest, plan.candidates)
            write_json(path, [tuple(step) for step in order])
        if order[-1][-1] > share:
            raise OutOfReach(f"removing every module leaves {order[-1][-1]:.3f} of the decoder's operations")
        return [Removed(*step) for step in order]


def _mark(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def shard(groups: Sequence[Sequence[Cell]], number: int, count: int) -> Iterator[Sequence[Cell]]:
    """The share of process ``number`` of ``count``, from 1, on any host: groups go round the processes in turn."""
    return (group for place, group in enumerate(groups) if place % count == number - 1)


def token_count(documents: Sequence[Document]) -> int:
    """Tokens of some documents."""
    return sum(len(document["input_ids"]) for document in documents)
