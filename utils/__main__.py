"""The entrypoints of an installed package: ``router-tuning finetune_mod --help``."""

from __future__ import annotations

import runpy
import sys

from router_tuning.places import SHIPPED


def main() -> None:
    """Run the entrypoint that the first argument names with the others."""
    commands = {path.stem: path for path in sorted(SHIPPED.glob("entrypoints/*/*.py"))}
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name not in commands:
        sys.exit(f"usage: router-tuning COMMAND [--help], where COMMAND is one of\n  {' '.join(sorted(commands))}")
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    runpy.run_path(str(commands[name]), run_name="__main__")


if __name__ == "__main__":
    main()
