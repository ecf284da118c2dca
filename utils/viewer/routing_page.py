"""One self-contained HTML page from the data of :mod:`router_tuning.viewer.routing_trace`."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("routing_page.html")


def routing_page(data: Mapping[str, Any], title: str) -> str:
    """HTML with data, style and script inside: it opens from a disk, without a network.

    ``data`` holds ``routers, prompts, capacity, dynamics`` of :func:`routing_trace.collect`, ``dial`` (a curve, may be
    empty), ``training`` (log lines, may be empty) and ``metadata`` (``{name: text}``).
    """
    # "</" would end the script element that carries the data.
    packed = (
        json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "\\u003c!--")
    )
    page = TEMPLATE.read_text(encoding="utf-8")
    return page.replace("{{title}}", html.escape(title)).replace("{{data}}", packed)
