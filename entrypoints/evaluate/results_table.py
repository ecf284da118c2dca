"""One table from results files of evaluate_mod.py, one column per file, with standard errors and capacity per task.

    python entrypoints/evaluate/results_table.py dense.json tuned.json tuned-0.5.json --output table
Writes table.md and table.tex and prints the table. Seconds are those of the whole evaluation, lm-eval included; for a
fair time ratio of two models measure both in one process (compare_run.py, benchmark_speed.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from utils.errors import UserError, cli
from utils.evaluation.output import write_text
from utils.evaluation.results import files_table


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="files written by evaluate_mod.py")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.tex")
    return parser.parse_args()


def read(path: Path) -> dict:
    """One results file; :class:`UserError` if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict) or not {"scores", "meter", "groups"} <= set(content):
        raise UserError(f"{path}: not a results file of evaluate_mod.py")
    return {"name": path.stem, **content}


def main() -> None:
    args = parse_args()
    table = files_table([read(path) for path in args.results])
    if args.output:
        write_text(args.output.with_suffix(".md"), table.markdown() + "\n")
        write_text(args.output.with_suffix(".tex"), table.latex() + "\n")
    print(table.text())


if __name__ == "__main__":
    cli(main)
