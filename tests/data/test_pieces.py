"""Pieces of a file that are made before their place is known, and the board that says it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_tuning.data import pieces
from router_tuning.data.board import DATA, READ, ROWS, UNKNOWN, Board, Stopped
from router_tuning.data.pieces import Piece
from router_tuning.data.writing import WriteError


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.binary(max_size=9), max_size=12),
    known=st.integers(0, 12),
    before=st.integers(0, 5),
    write=st.integers(1, 20),
    held=st.integers(1, 30),
)
def test_a_piece_comes_to_its_place(parts, known: int, before: int, write: int, held: int, tmp_path_factory):
    """Whenever the place becomes known, held in memory or spilled; what lies around it stays as it is."""
    folder = tmp_path_factory.mktemp("piece")
    path = folder / "file"
    path.write_bytes(b"-" * 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "WRITE_BYTES", write)
        patch.setattr(pieces, "HELD_BYTES", held)
        with Piece(path, before) as piece:
            for number, part in enumerate(parts):
                piece.write(part, 100 if number >= known else UNKNOWN)
            piece.place(100)
            piece.place(100)
            assert piece.size == before + sum(map(len, parts))
    whole = b"".join(parts)
    assert path.read_bytes() == b"-" * (100 + before) + whole + b"-" * (200 - before - len(whole))
    assert list(folder.iterdir()) == [path]


def test_a_piece_of_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(WriteError, match=f"{tmp_path / 'none'} cannot be written"):
        Piece(tmp_path / "none")


def test_waiting_for_what_another_fills_in():
    board = Board(2, 3)
    threading.Timer(0.02, board.put, (1, ROWS, 7)).start()
    assert board.wait(0, 1, ROWS) == 7 and board.get(1, DATA) == UNKNOWN
    board.put(2, READ, 5)
    assert board.read() == 5
    board.clear(1, 2)
    assert board.get(1, ROWS) == UNKNOWN and board.read() == 0


@pytest.mark.parametrize("stopped", [0, None])
def test_waiting_in_vain(stopped: int | None):
    """For a data set that is given up, or when all work is; another data set goes on."""
    board = Board(2, 3)
    threading.Timer(0.02, board.stop, (stopped,)).start()
    started = time.perf_counter()
    with pytest.raises(Stopped):
        board.wait(0, 1, ROWS)
    assert time.perf_counter() - started < 2
    if stopped is None:
        assert board.over
    else:
        board.check(1)
        board.allow(0)
        board.check(0)
