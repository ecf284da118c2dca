"""Tables of what was timed, from the rows of a journal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from router_tuning.evaluation.tables import Cell, Table
from router_tuning.speed.cells import Row

Grouped = dict[tuple, dict[tuple, Row]]


def speed_table(rows: list[Row]) -> Table:
    """One line per setting and capacity: speed-up, its ideal, and the share of the ideal saving that is reached."""
    header = ["phase", "granularity", "kv", "skip path", "capacity", "speed-up", "ideal", "skip efficiency"]
    return Table(
        [*header, "KV bytes"],
        [
            [
                f"{row['phase']} {row['batch']}×{row['length']}",
                row["granularity"],
                row["kv_policy"],
                row["skip"],
                f"{row['capacity']:.2f}",
                _speed_up(row) + (" (slower)" if row["time_ratio"] > 1 else ""),
                f"{1 / row['ideal_ratio']:.2f}×",
                _share(row["skip_efficiency"]),
                f"{row['kv_bytes_routed'] / row['kv_bytes_dense']:.2f}",
            ]
            for row in rows
            if "time_ratio" in row
        ],
    )


def gpu_tables(rows: list[Row]) -> dict[str, Table]:
    """What the plan for a GPU measured: ``speed``, and where it was measured ``other`` and ``profile``."""
    tables = {"speed": _gpu_speed([row for row in rows if "time_ratio" in row])}
    other = [_other(row) for row in rows if "micro_batch" in row or "seconds_in_all" in row]
    if other:
        tables["other"] = Table(["also measured", "ms", "memory"], other)
    profiled = [row for row in rows if "profiled" in row]
    if profiled:
        tables["profile"] = _profile(profiled)
    return tables


def print_rows(write: Callable[[str], None]) -> Callable[[str, list[Row]], None]:
    """A report for :func:`run_cells` that writes a line per row."""

    def report(name: str, rows: list[Row]) -> None:
        for row in rows:
            line = f"{name:40} {row['seconds']:6.1f} s  {row.get('failed', '')}"
            if "time_ratio" in row:
                line += f"{row['skip']:8} at {row['capacity']:.2f}: {_speed_up(row)}"
                line += f", ideal {1 / row['ideal_ratio']:.2f}×, limit {1 / row['limit_ratio']:.2f}×"
            write(line.rstrip())

    return report


def _gpu_speed(rows: list[Row]) -> Table:
    """A line per workload and granularity; a saving stands with its share of what the limit allows."""
    grouped: Grouped = {}
    for row in rows:
        line = (row["phase"], row["batch"], row["length"], row["granularity"])
        grouped.setdefault(line, {})[row["skip"], row["decisions"]] = row
    header = ["workload", "granularity", "dense, ms", "limit", "ideal", "at 0.5", "of limit", "at 0.5, skip path"]
    header += ["of limit", "at 1.0", "at 1.0, skip path", "KV bytes", "peak memory"]
    lines: list[list[Cell]] = []
    for (phase, batch, length, granularity), found in grouped.items():
        half, path = found["zero", 0.5], found.get(("low_rank", 0.5))
        lines.append(
            [
                f"{phase} {batch}×{length}",
                granularity,
                f"{half['seconds_dense']['median'] * 1e3:.1f}",
                f"{1 / half['limit_ratio']:.2f}×",
                f"{1 / half['ideal_ratio']:.2f}×",
                _with_quartiles(half),
                _share(half["limit_share"]),
                *([_with_quartiles(path), _share(path["limit_share"])] if path else [None, None]),
                *[_speed_up(found[skip, 1.0]) if (skip, 1.0) in found else None for skip in ("zero", "low_rank")],
                f"{half['kv_bytes_routed'] / half['kv_bytes_dense']:.2f}",
                _ratio(half["peak_bytes_routed"], half["peak_bytes_dense"]),
            ]
        )
    return Table(header, lines)


def _other(row: Row) -> list[Cell]:
    if "micro_batch" in row:
        name = f"tuning step {row['batch']}×{row['length']}, {row['granularity']}, micro-batch {row['micro_batch']}"
        return [
            name,
            f"{row['seconds_step'] * 1e3:.0f}",
            f"{(row['peak_bytes'] or row['step_bytes']) / 2**30:.1f} GiB",
        ]
    name = f"decode {row['batch']}×{row['length']}, dense, static cache, compiled"
    return [name, f"{row['seconds_dense']['median'] * 1e3:.1f}", None]


def _profile(rows: list[Row]) -> Table:
    names: list[tuple[str, Callable[[Row], Any]]] = [
        ("profiled step", lambda row: f"{row['phase']} {row['batch']}×{row['length']}, {row['granularity']}"),
        ("model", lambda row: row["profiled"]),
        ("step, ms", lambda row: f"{row['seconds_step'] * 1e3:.1f}"),
        ("on the device, ms", lambda row: f"{row['device_ms']:.1f}"),
        ("launches", lambda row: row["launches"]),
        ("host waits", lambda row: row["host_syncs"]),
        ("copies to host", lambda row: row["copies_to_host"]),
        ("longest kernels, ms", lambda row: "; ".join(f"{name} {ms:.2f}" for name, _, ms in row["top"][:3])),
    ]
    return Table([name for name, _ in names], [[give(row) for _, give in names] for row in rows])


def _speed_up(row: Row) -> str:
    return f"{1 / row['time_ratio']:.2f}×"


def _with_quartiles(row: Row) -> str:
    spread = row["time_ratio_spread"]
    return f"{_speed_up(row)} ({1 / spread['upper_quartile']:.2f}–{1 / spread['lower_quartile']:.2f})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _ratio(mine: int | None, other: int | None) -> str | None:
    return f"{mine / other:.2f}" if mine and other else None
