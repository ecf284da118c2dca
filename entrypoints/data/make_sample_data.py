"""Write the sample data: the generator's training split in the six raw formats, and the held-out items.

    python entrypoints/data/make_sample_data.py                       # data/sample/raw and data/sample/heldout
The files are the same bytes on every machine; those in git are what this command writes.
"""

from __future__ import annotations

from pathlib import Path

from router_tuning.embedded.sample_tasks import sample_files
from router_tuning.errors import at_least, cli, parser_of
from router_tuning.files import write_text
from router_tuning.places import ROOT


def main() -> None:
    """Parse, write, report."""
    parser = parser_of(__doc__)
    parser.add_argument("--save_path", type=Path, default=ROOT / "data" / "sample")
    parser.add_argument("--heldout_items", type=at_least(1), default=128, help="held-out items per task, at most")
    parser.add_argument("--first_seed", type=int, default=0, help="of the held-out items; another one draws others")
    args = parser.parse_args()
    for name, make in sample_files(args.heldout_items, args.first_seed).items():
        path = write_text(args.save_path / name, make())
        print(f"{path.stat().st_size:>9,} bytes  {path}")


if __name__ == "__main__":
    cli(main)
