"""Raw data sets to ``{"dataset", "id", "messages"}`` rows, data sets and stretches of files side by side.

Everything is made in ``<save_path>/<name>/.partial`` and moved to its final name when the data set is complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from utils.data.containers import recognise
from utils.data.conversion import Stopped
from utils.data.dataset_run import DatasetRun, Outcome
from utils.data.planning import cut_file, whole_files
from utils.data.sources import Source
from utils.data.streams import reading
from utils.data.workers import STOP, Workers, run_task
from utils.errors import UserError

POLL_SECONDS = 0.2
HASHED_BYTES = 1 << 20


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
    runs = [DatasetRun(source, save_path / source.name) for source in sources]
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(settings.workers, len(runs)))
        hashing = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(hashing.shutdown, wait=False, cancel_futures=True)
        stack.callback(workers.board.__setitem__, STOP, 1)
        _Schedule(runs, workers, hashing, settings).run()
    return [run.outcome for run in runs]


class _Schedule:
    def __init__(
        self, runs: list[DatasetRun], workers: Workers, hashing: ThreadPoolExecutor, settings: Settings
    ) -> None:
        self._runs, self._workers, self._settings = runs, workers, settings
        self._hashing = hashing
        self._counts: dict[int, list[Future]] = {}
        self._hashes: dict[int, list[Future]] = {}
        self._waiting: dict[Future, tuple[int, int]] = {}

    def run(self) -> None:
        """Until every data set is published or has failed."""
        # All files are counted before the first is converted, or counting would queue behind the conversion.
        for step in (self._count, self._start):
            for number in range(len(self._runs)):
                self._try(number, step, number)
        total = [run.total for run in self._runs if not run.over]
        with tqdm(desc="reformat", unit=" rows", total=None if None in total else sum(total)) as bar:
            while self._waiting:
                done, _ = wait(self._waiting, POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    if future in self._waiting:
                        number, unit = self._waiting.pop(future)
                        self._try(number, self._take, number, unit, future)
                bar.update(sum(self._workers.board[1:]) - bar.n)

    def _try(self, number: int, step: Callable, *arguments: object) -> None:
        """A step of one data set, unless it has failed before; if it fails now, that is the data set's outcome."""
        run = self._runs[number]
        if run.outcome.error:
            return
        try:
            step(*arguments)
        except UserError as error:
            run.outcome.error = str(error)
        except BrokenProcessPool:
            run.outcome.error = (
                f"{run.source.name}: a worker died (killed, or out of memory?); run again with --resume"
            )
        if run.outcome.error:
            self._withdraw(number)

    def _withdraw(self, number: int) -> None:
        for future in [future for future, (run, _) in self._waiting.items() if run == number]:
            future.cancel()
            del self._waiting[future]

    def _count(self, number: int) -> None:
        run, settings = self._runs[number], self._settings
        if settings.resume and run.published_before():
            return
        containers = [recognise(path) for path in run.source.files]
        if settings.resume and run.resume(containers):
            return
        if settings.workers == 1:
            run.start(whole_files(containers))
        else:
            self._counts[number] = [self._workers.executor.submit(cut_file, container) for container in containers]

    def _start(self, number: int) -> None:
        run = self._runs[number]
        if number in self._counts:
            self._hash(number)  # beside the counting, which leaves a processor free
            run.start([unit for counted in self._counts[number] for unit in counted.result()])
        if run.over:
            return
        if number not in self._hashes:
            self._hash(number)
        self._submit(number)

    def _hash(self, number: int) -> None:
        stopped, files = partial(self._workers.board.__getitem__, STOP), self._runs[number].source.files
        self._hashes[number] = [self._hashing.submit(sha256_of, path, stopped) for path in files]

    def _submit(self, number: int) -> None:
        for task in self._runs[number].ready():
            self._waiting[self._workers.executor.submit(run_task, task, number + 1)] = (number, task.number)

    def _take(self, number: int, unit: int, future: Future) -> None:
        run = self._runs[number]
        try:
            as_counted = run.finish(unit, future.result())
        except UserError:
            # A separator that is none, in a file of odd shape, cuts a row in two; whole files have the last word.
            if not run.is_cut:
                raise
            as_counted = False
        if as_counted:
            self._submit(number)
        else:
            self._begin_uncounted(number)
        if run.over:
            hashes = [future.result() for future in self._hashes[number]]
            run.publish(hashes, self._settings.max_reject_rate, self._settings.strict)

    def _begin_uncounted(self, number: int) -> None:
        """The files have other rows than separators; what still runs would write into the folder of the new start."""
        running = [future for future, (run, _) in self._waiting.items() if run == number and not future.cancel()]
        wait(running)
        self._withdraw(number)
        with self._workers.board.get_lock():
            self._workers.board[number + 1] = 0
        self._runs[number].start_uncounted()
        self._submit(number)


def sha256_of(path: Path, stopped: Callable[[], int]) -> str:
    """Of a file's bytes as they are on disk; raises Stopped when told to stop."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(HASHED_BYTES))
    with reading(path), path.open("rb", 0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            if stopped():
                raise Stopped
    return digest.hexdigest()
