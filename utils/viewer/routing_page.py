"""One self-contained HTML page from the data of :mod:`router_tuning.viewer.routing_trace`, and a picture of it."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from router_tuning.errors import UserError

TEMPLATE = Path(__file__).with_name("routing_page.html")
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
"""The page needs no network, and neither should the browser ask for any."""


def routing_page(data: Mapping[str, Any], title: str) -> str:
    """HTML with data, style and script inside: it opens from a disk, without a network.

    ``data`` holds ``routers, prompts, capacity, dynamics`` of :func:`routing_trace.collect`, ``dial`` (a curve, may be
    empty), ``training`` (``routing_history.json`` or None) and ``metadata`` (``{name: text}``).
    """
    # "</" would end the script element that carries the data.
    packed = (
        json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "\\u003c!--")
    )
    page = TEMPLATE.read_text(encoding="utf-8")
    return page.replace("{{title}}", html.escape(title)).replace("{{data}}", packed)


def take_picture(page: Path, target: Path, prompt: int = 0, size: tuple[int, int] = (1200, 1480)) -> Path:
    """Write ``target`` (PNG, ``size`` in pixels) by a headless Chromium: top of ``page``, a ``prompt`` from 0 on show.

    Raises:
        UserError: where there is no Chromium, or it draws nothing.
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
            shot.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)
    return target
