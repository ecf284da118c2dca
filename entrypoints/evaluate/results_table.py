"""Tables of results in Markdown and LaTeX: policies and their cost, differences document by document, tasks.

    python entrypoints/evaluate/results_table.py RUN/evaluation/comparison.jsonl --output table
    python entrypoints/evaluate/results_table.py dense.jsonl tuned.jsonl tuned-0.5.jsonl --output table
Takes what evaluate_mod.py, compare_run.py and experiments.py write. Writes table.md and table.tex, prints the tables.
"""

from __future__ import annotations

from pathlib import Path

from router_tuning.errors import cli, parser_of
from router_tuning.evaluation.records import all_tables, read_records
from router_tuning.files import write_text


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON-lines files of records")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.tex")
    args = parser.parse_args()
    made = all_tables(read_records(*args.results))
    if args.output:
        write_text(Path(f"{args.output}.md"), "\n\n".join(table.markdown() for table in made) + "\n")
        write_text(Path(f"{args.output}.tex"), "\n\n".join(table.latex() for table in made) + "\n")
    print("\n\n".join(table.text() for table in made))


if __name__ == "__main__":
    cli(main)
