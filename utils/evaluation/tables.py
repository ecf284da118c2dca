"""Tables of results, as terminal text, Markdown and LaTeX, from plain rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """``header`` names the columns; ``rows`` hold one cell per column; floats print with ``digits`` decimals."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    digits: int = 3

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"row {row!r} has {len(row)} cells, the header {len(self.header)}")

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Cell]], digits: int = 3) -> Table:
        """A table of rows that name their cells; a column in which no row has anything is left out."""
        found = list(rows)
        names = dict.fromkeys(name for row in found for name in row)
        kept = [name for name in names if any(row.get(name) is not None for row in found)]
        return cls(kept, [[row.get(name) for name in kept] for row in found], digits)

    def text(self) -> str:
        """Aligned columns for a terminal."""
        cells = self._cells()
        widths = [max(len(row[place]) for row in cells) for place in range(len(self.header))]
        lines = ["  ".join(self._align(row, widths)).rstrip() for row in cells]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    def markdown(self) -> str:
        """A GitHub table; numbers are right-aligned."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self._cells()]
        marks = ["---", *["---:"] * (len(self.header) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], marks, *cells[1:]])

    def latex(self) -> str:
        """A ``tabular`` with booktabs rules."""
        lines = [" & ".join(map(_tex, row)) + r" \\" for row in self._cells()]
        columns = "l" + "r" * (len(self.header) - 1)
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        return f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}"

    def _cells(self) -> list[list[str]]:
        return [list(self.header), *[[self._format(cell) for cell in row] for row in self.rows]]

    def _format(self, cell: Cell) -> str:
        if cell is None:
            return "-"
        return f"{cell:.{self.digits}f}" if isinstance(cell, float) else str(cell)

    @staticmethod
    def _align(row: Sequence[str], widths: Sequence[int]) -> list[str]:
        first, *rest = zip(row, widths, strict=True)
        return [first[0].ljust(first[1]), *[cell.rjust(width) for cell, width in rest]]


def with_error(value: float, error: float | None, digits: int = 3) -> str:
    """``0.873 ± 0.012``, or the value alone where no standard error is known."""
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def with_deviation(values: Sequence[float]) -> str | None:
    """The mean of some values, ± their standard deviation where there are several; None of none."""
    if not values:
        return None
    return with_error(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _tex(cell: str) -> str:
    for plain, escaped in (("\\", r"\textbackslash{}"), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#")):
        cell = cell.replace(plain, escaped)
    return cell.replace("±", r"$\pm$").replace("×", r"$\times$")
