"""Work in other processes, or in a thread of this one, with a board that all of them share."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import connection, get_context, parent_process

from router_tuning.data.board import Board
from router_tuning.data.conversion import State, Task, convert
from router_tuning.data.pages import keep_freed_pages

_board: Board | None = None


class Workers:
    """An executor for :func:`run_task`, which starts tasks in the order in which they are submitted.

    Submit a first one before any thread is started: the processes begin with that, and may be forks, which spares a
    third of a second. Where other threads run already, or on another system, they are started anew.
    """

    def __init__(self, count: int, board: Board) -> None:
        self._board = board
        self.executor: Executor
        if count == 1:
            self.executor = ThreadPoolExecutor(1, initializer=_share, initargs=(board,))
        else:
            forking = sys.platform == "linux" and threading.active_count() == 1
            processes = get_context("fork" if forking else "spawn")
            self.executor = ProcessPoolExecutor(count, processes, initializer=_start, initargs=(board,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._board.stop()
        self.executor.shutdown(wait=True, cancel_futures=True)


def run_task(task: Task) -> State:
    """Convert a stretch; if that fails, nobody waits for what lies behind it."""
    try:
        return convert(task, _board)
    except BaseException:
        _board.stop(task.run)
        raise


def _share(board: Board) -> None:
    global _board
    _board = board
    keep_freed_pages()  # to ask for new ones with every block would take longer than all else that is done to it


def _start(board: Board) -> None:
    _share(board)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed run must not leave workers behind that write into the files of the next one."""
    connection.wait([parent_process().sentinel])
    os._exit(1)
