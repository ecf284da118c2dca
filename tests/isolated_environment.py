"""A Python environment with the same packages but without this repository, as a user of an export has it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


class IsolatedPython:
    """A virtual environment that sees the site-packages of the running one, but not its editable installs.

    A ``.pth`` file adds the packages' folder as a plain path, so the ``.pth`` files inside that folder, by which
    ``pip install -e .`` works, are not read; ``-I`` drops PYTHONPATH and the working directory.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        [site] = folder.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text("\n".join(sorted(packages)) + "\n")
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
