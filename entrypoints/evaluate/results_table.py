"""Tables of results in Markdown and LaTeX, with standard errors and the capacity on each task.

    python entrypoints/evaluate/results_table.py RUN/evaluation/comparison.json --output table
    python entrypoints/evaluate/results_table.py dense.json tuned.json tuned-0.5.json --output table
A comparison (compare_run.py) gives dense, tuned and static masks side by side, and the speed measured with both models
taking turns in one process. Files of evaluate_mod.py give a column each; their seconds are those of the whole
evaluation, lm-eval included, and no fair time ratio. Writes table.md and table.tex and prints the tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from router_tuning.errors import UserError, cli
from router_tuning.evaluation.results import cost_table, files_table, score_table
from router_tuning.evaluation.tables import Table
from router_tuning.files import write_text


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="files of evaluate_mod.py, or one of compare_run.py")
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
    if not isinstance(content, dict) or not ({"scores", "meter", "groups"} <= set(content) or is_comparison(content)):
        raise UserError(f"{path}: not a results file of evaluate_mod.py or compare_run.py")
    return {"name": path.stem, **content}


def is_comparison(content: dict) -> bool:
    """Whether this is what compare_run.py writes."""
    return {"systems", "cost"} <= set(content)


def tables(paths: list[Path]) -> list[Table]:
    """What to print: scores and cost of a comparison, or one table over the files of single models."""
    files = [read(path) for path in paths]
    if is_comparison(files[0]) and len(files) == 1:
        return [score_table(files[0]), cost_table(files[0])]
    if any(map(is_comparison, files)):
        raise UserError("a comparison stands alone: give one comparison.json, or files of evaluate_mod.py")
    if len({file["name"] for file in files}) < len(files):  # two runs, say, both "tuned"
        files = [{**file, "name": path.stem} for file, path in zip(files, paths, strict=True)]
    return [files_table(files)]


def main() -> None:
    args = parse_args()
    made = tables(args.results)
    if args.output:
        write_text(args.output.with_suffix(".md"), "\n\n".join(table.markdown() for table in made) + "\n")
        write_text(args.output.with_suffix(".tex"), "\n\n".join(table.latex() for table in made) + "\n")
    print("\n\n".join(table.text() for table in made))


if __name__ == "__main__":
    cli(main)
