"""A picture of the routing page, taken by a headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from router_tuning.errors import UserError

COLOURS = 128
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""The page needs no network, and neither should the browser ask for any."""


def take_picture(page: Path, target: Path, prompt: int = 0, size: tuple[int, int] = (1200, 1480)) -> Path:
    """Write ``target`` (PNG, ``size`` in pixels): the top of ``page`` with its ``prompt`` (from 0) on show.

    Raises :class:`UserError` where there is no Chromium, or it draws nothing.
    """
    if PROGRAM is None:
        raise UserError("no Chromium to take a picture with (Debian: apt-get install chromium)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        picture = Path(profile) / "page.png"
        window = f"--window-size={size[0]},{size[1]}"
        command = [PROGRAM, *FLAGS, "--hide-scrollbars", f"--user-data-dir={profile}/profile", window]
        command += [f"--screenshot={picture}", f"{page.resolve().as_uri()}#prompt={prompt}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            raise UserError(f"{PROGRAM} did not draw {page} within two minutes") from None
        if not picture.is_file():
            raise UserError(f"{PROGRAM} drew nothing of {page}: {' '.join(done.stderr.split())[-300:]}")
        with Image.open(picture) as shot:  # a few flat colours: a palette makes a third of the bytes
            shot.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
    return target
