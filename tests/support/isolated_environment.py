"""A Python environment with some installed distributions alone, as users of an export or of the wheel have it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


class IsolatedPython:
    """A virtual environment with ``packages`` and what they require, by links to the installed files.

    Nothing else is there: not this repository (``pip install -e .`` works by a file that is not linked), nor what it
    alone requires. ``-I`` drops PYTHONPATH and the working directory.
    """

    def __init__(self, folder: Path, packages: Sequence[str]) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        [site] = folder.glob("lib/python*/site-packages")
        for name in sorted(closure(packages)):
            link_distribution(name, site)
        self.home = folder

    def run(self, *arguments: str, cwd: Path) -> str:
        """Run ``python -I <arguments>`` and return its standard output; raises CalledProcessError with stderr."""
        keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        env = keep | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(self.home / "modules")}
        done = subprocess.run(
            [str(self.python), "-I", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise subprocess.CalledProcessError(done.returncode, arguments, done.stdout, done.stderr)
        return done.stdout


def closure(packages: Sequence[str]) -> set[str]:
    """Names of the installed distributions that these and their requirements need."""
    found, seen, waiting = set(), set(), [Requirement(text) for text in packages]
    while waiting:
        wanted = waiting.pop()
        name, extras = re.sub(r"[-_.]+", "-", wanted.name).lower(), {"", *wanted.extras}
        if (name, *sorted(extras)) in seen:
            continue
        seen.add((name, *sorted(extras)))
        try:
            required = distribution(name).requires or []
        except PackageNotFoundError:  # of an optional extra, or built into another distribution
            continue
        found.add(name)
        for line in map(Requirement, required):
            if line.marker is None or any(line.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(line)
    return found


def link_distribution(name: str, site: Path) -> None:
    """Make what an installed distribution has in its site-packages importable from ``site``."""
    files = distribution(name).files or []
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        source, target = Path(distribution(name).locate_file(top)).resolve(), site / top
        if source.suffix != ".pth" and source.exists() and not target.exists():
            target.symlink_to(source)
