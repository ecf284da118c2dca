"""Raw data sets to ``{"dataset", "id", "messages"}`` rows, data sets and stretches of files side by side.

Everything is made in ``<save_path>/<name>/.partial`` and moved to its final name when the data set is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import xxhash
from tqdm import tqdm

from router_tuning.data.board import Board, Stopped
from router_tuning.data.containers import recognise
from router_tuning.data.conversion import Miscounted
from router_tuning.data.dataset_run import DatasetRun, Outcome
from router_tuning.data.sources import Source
from router_tuning.data.streams import reading
from router_tuning.data.workers import Workers, run_task
from router_tuning.data.writing import WriteError
from router_tuning.errors import UserError

POLL_SECONDS = 0.2
AHEAD = 4
"""Stretches handed out for each worker: enough that none is idle, and few to take back."""

HASHED_BYTES = 1 << 18


@dataclass(frozen=True)
class Settings:
    """How to run: worker processes, whether to go on with a killed run, and how many faulty rows (a share) to bear."""

    workers: int = 1
    resume: bool = False
    max_reject_rate: float = 0.01
    strict: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"--workers must be at least 1, not {self.workers}")
        if not 0 <= self.max_reject_rate <= 1:
            raise UserError(f"--max_reject_rate must be a share between 0 and 1, not {self.max_reject_rate}")


def reformat(sources: Sequence[Source], save_path: Path, settings: Settings) -> list[Outcome]:
    """Convert data sets into folders of ``save_path``; what hinders one of them is in its outcome, the others go on.

    Each folder gets ``data.jsonl``, ``rejects.jsonl`` and ``reformat.json``. The files are the same bytes for any
    number of workers, and after any number of kills and resumptions.
    """
    runs = [DatasetRun(source, save_path / source.name, number) for number, source in enumerate(sources)]
    _Schedule(runs, settings).run()
    return [run.outcome for run in runs]


class _Schedule:
    """Hands out the stretches of all data sets in order, a few more than the workers are at."""

    def __init__(self, runs: list[DatasetRun], settings: Settings) -> None:
        self._runs, self._settings = runs, settings
        self._board = Board(len(runs), 0)  # without entries until the plans say how many
        self._waiting: dict[Future, tuple[DatasetRun, int]] = {}
        self._hashing: dict[Future, DatasetRun] = {}
        self._hashes: dict[int, list[str]] = {}

    def run(self) -> None:
        """Until every data set is published or has failed."""
        for run in self._runs:
            self._try(run, self._plan)
        self._board = Board(len(self._runs), sum(run.entries for run in self._runs))
        first = 0
        for run in self._runs:
            run.show(self._board, first)
            first += run.entries
        with ExitStack() as stack:
            self._executor = stack.enter_context(Workers(self._settings.workers, self._board)).executor
            self._hand_out()
            hashing = stack.enter_context(ThreadPoolExecutor(1))
            stack.callback(hashing.shutdown, wait=False, cancel_futures=True)
            stack.callback(self._board.stop)
            for run in self._runs:
                if not run.outcome.error and not run.outcome.resumed:
                    self._hashing[hashing.submit(self._hash, run)] = run
            self._convert()

    def _convert(self) -> None:
        with tqdm(desc="reformat", unit=" rows") as bar:
            while self._waiting or self._hashing:
                done, _ = wait((*self._waiting, *self._hashing), POLL_SECONDS, FIRST_COMPLETED)
                for future in [future for future in (*self._waiting, *self._hashing) if future in done]:
                    if future in self._hashing:
                        self._try(self._hashing.pop(future), self._take_hashes, future)
                    elif future in self._waiting:  # and not withdrawn
                        run, number = self._waiting.pop(future)
                        self._try(run, self._take, number, future)
                self._hand_out()
                bar.update(self._board.read() - bar.n)

    def _try(self, run: DatasetRun, step: Callable, *arguments: object) -> None:
        """A step of one data set, unless it has failed before; if it fails now, that is the data set's outcome."""
        if run.outcome.error:
            return
        try:
            step(run, *arguments)
        except UserError as error:
            run.outcome.error = str(error)
        except BrokenProcessPool:
            run.outcome.error = (
                f"{run.source.name}: a worker died (killed, or out of memory?); run again with --resume"
            )
        if run.outcome.error:
            self._withdraw(run)

    def _withdraw(self, run: DatasetRun) -> list[Future]:
        """Take the stretches of a data set back; gives those that a worker is at, which will end soon."""
        withdrawn = [future for future, (other, _) in self._waiting.items() if other is run]
        for future in withdrawn:
            del self._waiting[future]
        self._board.stop(run.number)
        return [future for future in withdrawn if not future.cancel()]

    def _plan(self, run: DatasetRun) -> None:
        resume = self._settings.resume
        if resume and run.published_before():
            return
        containers = [recognise(path) for path in run.source.files]
        if not (resume and run.resume(containers)):
            run.start(containers)

    def _hand_out(self) -> None:
        for run in self._runs:
            self._try(run, self._submit)

    def _submit(self, run: DatasetRun) -> None:
        workers = self._settings.workers
        while len(self._waiting) < AHEAD * workers and (task := run.next_task(alone=workers == 1)):
            self._waiting[self._executor.submit(run_task, task)] = run, task.number

    def _take(self, run: DatasetRun, number: int, future: Future) -> None:
        try:
            run.finish(number, future.result())
        except Stopped:
            return  # for the sake of another stretch, which says why
        except Miscounted:
            self._begin_whole(run)
        except UserError as error:
            # A separator that is none, in a file of odd shape, cuts a row in two; whole files have the last word.
            if isinstance(error, WriteError) or not run.is_cut:
                raise
            self._begin_whole(run)
        self._publish(run)

    def _begin_whole(self, run: DatasetRun) -> None:
        wait(self._withdraw(run))  # they would write into the folder of the new start
        self._board.allow(run.number)
        run.start_whole()

    def _hash(self, run: DatasetRun) -> list[str]:
        def stopped() -> bool:
            return self._board.over or run.outcome.error is not None

        return [hash_of(path, stopped) for path in run.source.files]

    def _take_hashes(self, run: DatasetRun, future: Future) -> None:
        self._hashes[run.number] = future.result()
        self._publish(run)

    def _publish(self, run: DatasetRun) -> None:
        if run.over and run.number in self._hashes:
            run.publish(self._hashes[run.number], self._settings.max_reject_rate, self._settings.strict)


def hash_of(path: Path, stopped: Callable[[], bool]) -> str:
    """XXH3 (128 bits) of a file's bytes as they are on disk, as ``xxhsum -H2`` gives it; Stopped when told to stop.

    It tells which file it was, and guards against chance, not against malice: sha256 takes ten times as long, a sixth
    of all the work on a data set.
    """
    digest, chunk = xxhash.xxh3_128(), memoryview(bytearray(HASHED_BYTES))
    with reading(path), path.open("rb", 0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            if stopped():
                raise Stopped
    return digest.hexdigest()
