"""Tables of what was timed, from the rows of a journal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from router_tuning.evaluation.tables import Table
from router_tuning.speed.cells import Row

Column = Callable[[Row], Any]
NAMES = {
    "tune": "training step, routers",
    "train": "training step, all weights",
    "compiled": "compiled decoding, dense",
}


def speed_tables(rows: list[Row]) -> dict[str, Table]:
    """Of those that hold something: ``speed`` of routed passes, ``other`` steps, and ``profile``."""
    found = {
        "speed": _table(
            [row for row in rows if "time_ratio" in row],
            {
                "phase": lambda row: f"{row['phase']} {row['batch']}×{row['length']}",
                "granularity": lambda row: row["granularity"],
                "kv": lambda row: row["kv_policy"],
                "skip path": lambda row: row["skip"],
                "capacity": lambda row: f"{row['capacity']:.2f}",
                "FLOPs": lambda row: f"{row['share']:.2f}" if "share" in row else None,
                "dense, ms": lambda row: f"{row['seconds_dense']['median'] * 1e3:.1f}",
                "speed-up": lambda row: _speed_up(row) + (" (slower)" if row["time_ratio"] > 1 else ""),
                "ideal": lambda row: f"{1 / row['ideal_ratio']:.2f}×",
                "skip efficiency": lambda row: _number(row["skip_efficiency"]) or "–",
                "KV bytes": lambda row: f"{row['kv_bytes_routed'] / row['kv_bytes_dense']:.2f}",
                "peak memory": lambda row: _ratio(row["peak_bytes_routed"], row["peak_bytes_dense"]),
            },
        ),
        "other": _table(
            [row for row in rows if "seconds_step" in row],
            {
                "step": lambda row: f"{NAMES[row['phase']]} {row['batch']}×{row['length']}",
                "ms": lambda row: f"{row['seconds_step'] * 1e3:.1f}",
                "at once": lambda row: row.get("micro_batch"),
                "peak, MB": lambda row: f"{row['peak_bytes'] / 1e6:.0f}" if row.get("peak_bytes") else None,
            },
        ),
        "profile": _table(
            [row for row in rows if "profile_routed" in row],
            {
                "pass": lambda row: f"{row['phase']} {row['batch']}×{row['length']}, {row['granularity']}",
                "capacity": lambda row: f"{row['capacity']:.2f}",
                **{f"{name.replace('_', ' ')}, dense → routed": lambda row, name=name: _both(row, name)
                   for name in ("device_ms", "launches", "host_waits", "copies_to_host")},
                "device speed-up": lambda row: "{:.2f}×".format(
                    row["profile_dense"]["device_ms"] / row["profile_routed"]["device_ms"]
                ),
            },
        ),
    }  # fmt: skip
    return {name: table for name, table in found.items() if table.rows}


def print_rows(write: Callable[[str], None]) -> Callable[[str, list[Row]], None]:
    """A report for :func:`run_cells` that writes a line per row."""

    def report(name: str, rows: list[Row]) -> None:
        for row in rows:
            line = f"{name:40} {row['seconds']:6.1f} s  {row.get('failed', '')}"
            if "time_ratio" in row:
                line += (
                    f"{row['skip']:8} at {row['capacity']:.2f}: {_speed_up(row)}, ideal {1 / row['ideal_ratio']:.2f}×"
                )
            write(line.rstrip())

    return report


def _table(rows: list[Row], columns: dict[str, Column]) -> Table:
    """Columns of which no row knows anything are left out."""
    return Table.of_columns({name: [give(row) for row in rows] for name, give in columns.items()})


def _both(row: Row, name: str) -> str:
    return " → ".join(f"{row[f'profile_{side}'][name]:.4g}" for side in ("dense", "routed"))


def _speed_up(row: Row) -> str:
    return f"{1 / row['time_ratio']:.2f}×"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def _ratio(mine: int | None, other: int | None) -> str | None:
    return f"{mine / other:.2f}" if mine and other else None
