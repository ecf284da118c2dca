"""Work in other processes, or in a thread of this one, with counters that all of them share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import connection, get_context, parent_process
from multiprocessing.sharedctypes import SynchronizedArray

from utils.data.conversion import State, Stopped, Task, convert

STOP = 0
_SPAWN = get_context("spawn")
_board: SynchronizedArray | None = None


class Workers:
    """An executor for :func:`run_task` and other functions of one argument, and the board of its progress.

    ``board[STOP]`` is 1 once the work is to end; the other cells count the rows of each data set.
    """

    def __init__(self, count: int, cells: int) -> None:
        self.board = _SPAWN.Array("q", cells + 1)
        self.executor: Executor
        if count == 1:
            self.executor = ThreadPoolExecutor(1, initializer=_share, initargs=(self.board,))
        else:
            self.executor = ProcessPoolExecutor(count, _SPAWN, initializer=_start, initargs=(self.board,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.board[STOP] = 1
        self.executor.shutdown(wait=True, cancel_futures=True)


def run_task(task: Task, cell: int) -> State:
    """Convert a unit, counting its rows in a cell of the board."""
    return convert(task, _counter(cell))


def _counter(cell: int) -> Callable[[int], None]:
    board = _board

    def count(rows: int) -> None:
        if board[STOP]:
            raise Stopped
        with board.get_lock():
            board[cell] += rows

    return count


def _share(board: SynchronizedArray) -> None:
    global _board
    _board = board


def _start(board: SynchronizedArray) -> None:
    _share(board)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed run must not leave workers behind that write into the files of the next one."""
    connection.wait([parent_process().sentinel])
    os._exit(1)
