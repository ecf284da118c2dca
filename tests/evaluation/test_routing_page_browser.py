"""The routing report in headless Chromium: drawn, usable by keyboard, readable on a phone, dark and light."""

from __future__ import annotations

import json
import struct

import pytest

pytest.importorskip("aiohttp")
from chromium import PROGRAM, Page  # noqa: E402

from router_tuning.viewer.routing_page import routing_page, take_picture  # noqa: E402

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here (Debian: apt-get install chromium)")

ROUTERS = ["4.attn", "4.mlp", "5.attn"]


def prompt(task, words, new):
    count = len(words) + new
    tokens = [float((place * 7 + len(task)) % 3 > 0) for place in range(count)]
    routers = {
        "4.attn": {"keep": 1, "score": 0.8},
        "4.mlp": {"keep": tokens, "score": [0.25 + 0.5 * kept for kept in tokens]},
        "5.attn": {"keep": 0, "score": 0.3},
    }
    shown = words + [f"new{n}" for n in range(new)]
    shown_prompt = {"prompt": "שלום 🙂 " + " ".join(words)}
    return shown_prompt | {
        "task": task,
        "tokens": shown,
        "prompt_tokens": len(words),
        "answer": "yes </script>",
        "routers": routers,
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    shares = {name: 0.5 for name in ROUTERS}
    data = {
        "routers": ROUTERS,
        "prompts": [prompt("add", ["a", "<b>", "⏎"], 2), prompt("copy", [f"w{n}" for n in range(60)], 4)],
        "capacity": {
            "total": 0.5,
            "by_router": shares,
            "by_task": {"add": shares, "copy": shares},
            "by_position": {"4.mlp": [0.1 * n for n in range(10)]},
            "by_phase": {"4.mlp": {"prompt": 0.5, "generated": None}},
        },
        "dynamics": {
            "inputs": 2,
            "masks": 2,
            "most_common": 0.5,
            "mask_entropy": 1.0,
            "task_information": 1.0,
            "routers": [{"kept": 0.5, "entropy": 1.0, "information": 0.2}] * 3,
        },
        "dial": [{"label": "a", "capacity": 0.2, "loss": 2.0}, {"label": "b", "capacity": 1.0, "loss": 1.0}],
        "training": {"step": [1, 2], "total": [1.0, 0.5], "routers": {"04": [1.0, 0.4]}},
        "metadata": {"model": "tiny", "commit": "abc"},
    }
    (folder / "report.html").write_text(routing_page(data, "Routing of tiny"), encoding="utf-8")
    with Page(folder / "profile") as browser:
        browser.screen(1200, 900)
        browser.open(folder / "report.html")
        yield browser


def test_every_section_is_drawn_without_errors_or_requests(page):
    headings = page.evaluate("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert len(headings) == 7 and page.errors == []
    assert len(page.requests) == 1 and page.requests[0].startswith("file:"), "the page must not fetch anything"
    assert page.evaluate("document.querySelectorAll('#map tbody tr').length") == 3
    assert page.evaluate("document.querySelectorAll('#map tbody td').length") == 1 + 5 + 1
    assert page.evaluate("document.querySelectorAll('#map th.generated').length") == 2
    assert page.evaluate("document.querySelectorAll('#dial circle').length") == 2
    assert page.evaluate("document.querySelectorAll('#training polyline').length") == 2
    assert page.evaluate("document.querySelector('#map th.token:nth-child(3)').textContent") == "<b>"
    assert "50.0 % of the routed work" in page.evaluate("document.getElementById('summary').textContent")


def test_decisions_are_told_by_shape_and_words_not_colour_alone(page):
    cells = json.loads(
        page.evaluate(
            "JSON.stringify([...document.querySelectorAll('#map td')].map(c => [c.textContent, c.ariaLabel]))"
        )
    )
    assert {text for text, _ in cells} == {"■", "·"}
    for text, label in cells:
        assert ("runs" if text == "■" else "skipped") in label and label.startswith("router ")


def test_keyboard_reaches_and_walks_the_map(page):
    page.evaluate("document.getElementById('next').focus()")
    page.press("Tab")
    place = "[document.activeElement.dataset.router, document.activeElement.dataset.token].join()"
    if page.evaluate("document.activeElement.classList.contains('scroll')"):
        page.press("Tab")
    assert page.evaluate(place) == "0,0", "one Tab leads from the buttons into the map"
    for key, expected in (("ArrowRight", "0,0"), ("ArrowDown", "1,0"), ("End", "1,4"), ("ArrowRight", "1,4"),
                          ("Home", "1,0"), ("ArrowUp", "0,0"), ("ArrowUp", "0,0")):  # fmt: skip
        page.press(key)
        assert page.evaluate(place) == expected, key
    assert page.evaluate("document.querySelectorAll('#map td[tabindex=\"0\"]').length") == 1
    assert "Router 4.attn, whole sequence" in page.evaluate("document.getElementById('detail').textContent")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_keys_buttons_and_list_change_the_prompt(page):
    count = "document.querySelectorAll('#map tbody td').length"
    page.evaluate("document.body.focus(), document.activeElement.blur()")
    page.press("n")
    assert page.evaluate(count) == 1 + 64 + 1 and page.evaluate("document.getElementById('prompt').value") == "1"
    assert page.evaluate("location.hash") == "#prompt=1"
    page.press("p")
    assert page.evaluate(count) == 7
    page.evaluate("document.getElementById('next').click()")
    assert page.evaluate(count) == 1 + 64 + 1
    page.evaluate("document.getElementById('next').click()")
    assert page.evaluate(count) == 7, "after the last prompt comes the first"


def test_a_phone_scrolls_the_map_not_the_page(page):
    page.screen(360, 740)
    page.evaluate("document.getElementById('next').click()")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate(
        "document.querySelector('.scroll').scrollWidth > document.querySelector('.scroll').clientWidth"
    )
    small = page.evaluate(
        "[...document.querySelectorAll('button, select')].filter(e => e.getBoundingClientRect().height < 40).length"
    )
    assert small == 0, "touch targets"
    page.evaluate("document.getElementById('next').click()")
    page.screen(1200, 900)


def test_dark_follows_the_reader_and_the_button_overrides(page):
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.screen(1200, 900, dark=True)
    dark = page.evaluate(colour)
    assert light == "rgb(255, 255, 255)" and dark == "rgb(19, 20, 24)"
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(colour) == light
    page.screen(1200, 900)
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(colour) == dark
    assert page.evaluate("document.getElementById('theme').getAttribute('aria-pressed')") == "true"


def test_screenshot_has_the_size_of_the_window(page):
    picture = page.screenshot()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", picture[16:24]) == (1200, 900)
    assert len(picture) > 10_000


def test_a_picture_of_another_prompt_differs(page, tmp_path):
    html = page.profile.parent / "report.html"
    pictures = [take_picture(html, tmp_path / f"{n}.png", n, (600, 700)).read_bytes() for n in (0, 1)]
    assert all(struct.unpack(">II", picture[16:24]) == (600, 700) for picture in pictures)
    assert pictures[0] != pictures[1] and min(map(len, pictures)) > 10_000
