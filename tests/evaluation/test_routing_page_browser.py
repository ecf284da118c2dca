"""The routing report in headless Chromium: drawn, usable by keyboard, readable on a phone, dark and light."""

import html
import json
import re
import shutil
import subprocess

import pytest

from router_tuning.viewer.routing_page import routing_page

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here (Debian: apt-get install chromium)")

ROUTERS = ["4.attn", "4.mlp", "5.attn"]
SHARES = dict.fromkeys(ROUTERS, 0.5)


def prompt(task, words, new):
    tokens = [float((place * 7 + len(task)) % 3 > 0) for place in range(len(words) + new)]
    routers = {
        "4.attn": {"keep": 1, "score": 0.8},
        "4.mlp": {"keep": tokens, "score": [0.25 + 0.5 * kept for kept in tokens]},
        "5.attn": {"keep": 0, "score": 0.3},
    }
    shown = {"prompt": "שלום 🙂 " + " ".join(words), "answer": "yes </script>", "tokens": words + ["new"] * new}
    return shown | {"task": task, "prompt_tokens": len(words), "routers": routers}


DATA = {
    "routers": ROUTERS,
    "prompts": [prompt("add", ["a", "<b>", "⏎"], 2), prompt("copy", [f"w{n}" for n in range(60)], 4)],
    "capacity": {
        "total": 0.5,
        "by_router": SHARES,
        "by_task": {"add": SHARES, "copy": SHARES},
        "by_position": {"4.mlp": [0.1 * n for n in range(10)]},
        "by_phase": {"4.mlp": {"prompt": 0.5, "generated": None}},
    },
    "dynamics": {
        **dict(inputs=2, masks=2, most_common=0.5, mask_entropy=1.0, task_information=1.0),
        "routers": [{"kept": 0.5, "entropy": 1.0, "information": 0.2}] * 3,
    },
    "dial": [{"label": "a", "capacity": 0.2, "loss": 2.0}, {"label": "b", "capacity": 1.0, "loss": 1.0}],
    "training": [{"step": 1 + n, "capacity": 1 - n / 2, "capacity_layer_04": 1 - n} for n in range(2)],
    "metadata": {"model": "tiny", "commit": "abc"},
}
SESSION = """<iframe id="frame" width="1200" height="900" src="report.html"></iframe><pre id="found"></pre><script>
const frame = document.getElementById("frame");
frame.onload = () => {
  const page = frame.contentDocument, inside = frame.contentWindow, $ = id => page.getElementById(id);
  const all = what => [...page.querySelectorAll(what)], count = what => all(what).length;
  const press = key => page.activeElement.dispatchEvent(new inside.KeyboardEvent("keydown", { key, bubbles: true }));
  const place = () => [page.activeElement.dataset.router, page.activeElement.dataset.token].join();
  const colour = () => inside.getComputedStyle(page.body).backgroundColor;
  const shown = () => [count("#map tbody td"), $("prompt").value, inside.location.hash];
  const found = { requests: inside.performance.getEntriesByType("resource").length, headings: count("h2"),
    drawn: ["#map tbody tr", "#map tbody td", "#map th.generated", "#dial circle", "#training polyline"].map(count),
    token: page.querySelector("#map th.token:nth-child(3)").textContent, summary: $("summary").textContent,
    cells: all("#map td").map(cell => [cell.textContent, cell.ariaLabel]) };
  const stops = all("button, select, [tabindex]").filter(node => node.tabIndex >= 0);
  stops[stops.indexOf($("next")) + 1].focus();
  found.walk = [place()];
  for (const key of ["ArrowRight", "ArrowDown", "End", "ArrowRight", "Home", "ArrowUp", "ArrowUp"])
    press(key), found.walk.push(place());
  found.stops = count('#map td[tabindex="0"]'), found.detail = $("detail").textContent;
  found.outline = inside.getComputedStyle(page.activeElement).outlineStyle;
  page.activeElement.blur();
  found.prompts = [() => press("n"), () => press("p"), () => $("next").click()].map(act => (act(), shown()));
  frame.width = 360;
  const scroll = page.querySelector(".scroll");
  found.phone = [page.documentElement.scrollWidth <= 360, scroll.scrollWidth > scroll.clientWidth,
    all("button, select").filter(node => node.getBoundingClientRect().height < 40).length];
  $("next").click();
  found.round = shown();
  found.colours = [colour()];
  for (const _ of [1, 2]) $("theme").click(), found.colours.push(colour(), $("theme").getAttribute("aria-pressed"));
  document.getElementById("found").textContent = JSON.stringify({ ...found, errors: inside.errors });
};
</script>"""


def session(folder, *flags):
    """What a reader finds on the page, who walks it by keys, on a large window and a small one."""
    noted = "<script>errors = []; onerror = message => { errors.push(message); };</script>"
    (folder / "report.html").write_text(noted + routing_page(DATA, "Routing of tiny"), encoding="utf-8")
    (folder / "session.html").write_text(SESSION, encoding="utf-8")
    options = ["--allow-file-access-from-files", "--virtual-time-budget=10000", f"--user-data-dir={folder}/profile"]
    command = [PROGRAM, *FLAGS, *options, *flags, "--dump-dom", (folder / "session.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)[1]))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return session(tmp_path_factory.mktemp("browser"))


def test_every_section_is_drawn_and_decisions_are_told_by_shape_and_words_not_colour_alone(found):
    assert found["headings"] == 7 and found["errors"] == [] and found["requests"] == 0
    assert found["drawn"] == [3, 1 + 5 + 1, 2, 2, 2]
    assert found["token"] == "<b>" and "50.0 % of the routed work" in found["summary"]
    assert {text for text, _ in found["cells"]} == {"■", "·"}
    for text, label in found["cells"]:
        assert ("runs" if text == "■" else "skipped") in label and label.startswith("router ")


def test_keys_and_buttons_walk_the_map_and_change_the_prompt(found):
    assert found["walk"] == ["0,0", "0,0", "1,0", "1,4", "1,4", "1,0", "0,0", "0,0"], "next to the buttons, by one Tab"
    assert found["stops"] == 1 and "Router 4.attn, whole sequence" in found["detail"] and found["outline"] == "solid"
    assert found["prompts"] == [[1 + 64 + 1, "1", "#prompt=1"], [7, "0", "#prompt=0"], [66, "1", "#prompt=1"]]
    assert found["round"] == [7, "0", "#prompt=0"], "after the last prompt comes the first"


def test_a_phone_scrolls_the_map_and_dark_follows_the_reader(found, tmp_path):
    assert found["phone"] == [True, True, 0], "the map, not the page; and touch targets are 40 pixels high"
    light, dark = "rgb(255, 255, 255)", "rgb(19, 20, 24)"
    assert found["colours"] == [light, dark, "true", light, "false"], "the button overrides"
    other = session(tmp_path, "--blink-settings=preferredColorScheme=0")
    assert other["colours"] == [dark, light, "false", dark, "true"]
