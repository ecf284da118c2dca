"""Tables of what was timed, from the rows of a journal."""

from __future__ import annotations

from router_tuning.evaluation.tables import Cell, Table
from router_tuning.speed.cells import Row

NAMES = {
    "tune": "training step, routers",
    "train": "training step, all weights",
    "compiled": "compiled decoding, dense",
}


def speed_tables(rows: list[Row]) -> dict[str, Table]:
    """Of those that hold something: ``speed`` of routed passes, ``other`` steps, and ``profile``."""
    made = {
        "time_ratio": ("speed", _timed),
        "seconds_step": ("other", _step),
        "profile_routed": ("profile", _profiled),
    }
    found = {name: [make(row) for row in rows if key in row] for key, (name, make) in made.items()}
    return {name: Table.of(shown, digits=2) for name, shown in found.items() if shown}


def _timed(row: Row) -> dict[str, Cell]:
    return {
        "phase": f"{row['phase']} {row['batch']}×{row['length']}",
        "granularity": row["granularity"],
        "kv": row["kv_policy"],
        "skip path": row["skip"],
        "capacity": float(row["capacity"]),
        "FLOPs": row.get("share"),
        "dense, ms": f"{row['seconds_dense']['median'] * 1e3:.1f}",
        "speed-up": _speed_up(row) + (" (slower)" if row["time_ratio"] > 1 else ""),
        "ideal": f"{1 / row['ideal_ratio']:.2f}×",
        "skip efficiency": "–" if row["skip_efficiency"] is None else row["skip_efficiency"],
        "KV bytes": row["kv_bytes_routed"] / row["kv_bytes_dense"],
        "peak memory": row["peak_bytes_dense"] and row["peak_bytes_routed"] / row["peak_bytes_dense"],
    }


def _step(row: Row) -> dict[str, Cell]:
    return {
        "step": f"{NAMES[row['phase']]} {row['batch']}×{row['length']}",
        "ms": f"{row['seconds_step'] * 1e3:.1f}",
        "at once": row.get("micro_batch"),
        "peak, MB": row.get("peak_bytes") and f"{row['peak_bytes'] / 1e6:.0f}",
    }


def _profiled(row: Row) -> dict[str, Cell]:
    dense, routed = row["profile_dense"], row["profile_routed"]
    return {
        "pass": f"{row['phase']} {row['batch']}×{row['length']}, {row['granularity']}",
        "capacity": float(row["capacity"]),
        **{f"{name.replace('_', ' ')}, dense → routed": f"{dense[name]:.4g} → {routed[name]:.4g}"
           for name in ("device_ms", "launches", "host_waits", "copies_to_host")},
        "device speed-up": f"{dense['device_ms'] / routed['device_ms']:.2f}×",
    }  # fmt: skip


def line_of(row: Row) -> str:
    """A row in short, while more are measured."""
    line = f"{row['cell']:40} {row['seconds']:6.1f} s  {row.get('failed', '')}"
    if "time_ratio" in row:
        line += f"{row['skip']:8} at {row['capacity']:.2f}: {_speed_up(row)}, ideal {1 / row['ideal_ratio']:.2f}×"
    return line.rstrip()


def _speed_up(row: Row) -> str:
    return f"{1 / row['time_ratio']:.2f}×"
