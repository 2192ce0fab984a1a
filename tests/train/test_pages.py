"""The kit of the pages: what it escapes, what it draws, and what a reader can do with it in a browser."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from mixtral_jax.train.pages import (
    Mark,
    Section,
    Series,
    choose,
    details,
    escape,
    grid,
    heat_map,
    lines,
    number,
    page,
    stacked,
    table,
    tiles,
)

NASTY = "</script><script>window.boomed = 1</script>\"'&<!-- \x00\x07\x7f \ud800 é日"
SHOWN = "</script><script>window.boomed = 1</script>\"'&<!-- ␀␇␡ � é日"
STEPS = [0, 100, 200, 300, 400, 500]
AXES = {
    "run": {"step": STEPS, "tokens": [1000.0 * s for s in STEPS]},
    "eval": {"step": [0, 250, 500], "tokens": [0.0, 250e3, 500e3]},
}


class Reader(HTMLParser):
    """What a parser of another house makes of a page: text by element, and the values of attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self._tag = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append((self._tag, data))

    def data(self) -> list[Any]:
        """What is embedded for the script."""
        return [json.loads(text) for tag, text in self.texts if tag == "script" and text.startswith("{")]


def demo(name: str = "train") -> str:
    loss = [4.0, 3.5, math.nan, 2.5, None, 2.0]
    other = [1.0, 2.0, 3.0, math.inf, 5.0, 6.0]
    low, high = ([None if y is None else y + d for y in loss] for d in (-0.5, 0.25))
    lost = ({"step": step, "tokens": 1000.0 * step} for step in (100, 200))
    marks = [Mark("attempt 2", {"step": 300, "tokens": 3e5}), Mark("lost", *lost)]
    both = [Series(name, "run", loss, low, high), Series("eval", "eval", [4.0, 3.0, 2.0])]
    charts = [
        lines("Loss", both, log=False, marks=marks),
        lines("Other", [Series(name, "run", other), Series("third", "run", other[::-1])], unit=" s"),
    ]
    shares = np.array([[10.0, 20, 70], [30, math.nan, 40]])
    heat = heat_map("Shares", shares, rows=["a", name], columns=range(3), unit=" %", also={"band ±": shares / 10})
    rows = [[name, 2.25, "x"], ["b", 10.0, "y"], ["c", None, NASTY], ["d", 2.5, "z"]]
    return page(f"Run {name}", [
        Section("Lines", name, [tiles({name: 1.5}), grid(charts)]),
        Section("Maps", "How.", [heat, stacked("Time", {name: {"steps": 3.0, name: 1.0}}, unit=" s")]),
        Section("Tables", "What.", [
            table([name, "number", "text"], rows, caption=name, sortable=True),
            choose("layer", {str(i): f"<p>panel {i}</p>" for i in range(3)}),
            choose("layer", {str(i): f"<p>other {i}</p>" for i in range(12)}),
            details(name, f"<pre>{escape(name)}</pre>"),
        ]),
    ], subtitle=name, axes=AXES)  # fmt: skip


def test_any_text_is_shown_and_none_is_markup() -> None:
    read, plain = Reader(demo(NASTY)), Reader(demo())
    demo(NASTY).encode()
    assert [name for _, name, _ in read.attributes] == [name for _, name, _ in plain.attributes]
    said = {text for _, text in read.texts}
    assert {SHOWN, f"Run {SHOWN}"} <= said
    assert ("dt", SHOWN) in read.texts and ("figcaption", SHOWN) in read.texts
    assert any(value and value.startswith(f"{SHOWN}: 1 s (25.0%)") for _, name, value in read.attributes)
    names = {one["name"] for data in read.data() for one in data.get("series", ())}
    assert names == {NASTY, "eval", "third"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567, "1.235M"), (12345, "12,345"), (0.00012345, "0.0001234"), (-5e-5, "−5e−5"), (-2.5, "−2.5"),
     (31415.9, "31,416"), (math.nan, "NaN"), (-math.inf, "−∞"), (None, ""), ("as it is", "as it is"), (8e9, "8G")],
)  # fmt: skip
def test_numbers_for_people(value: Any, text: str) -> None:
    assert number(value) == text


def picture(html: str) -> np.ndarray:
    """The map's picture as another program reads it, one dot a cell: red, green, blue, alpha from 0 to 1."""
    found = re.search(r'<image href="data:image/png;base64,([^"]+)"', html)
    assert found
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(found[1])), format="png")[4::8, 4::8]


def test_maps_have_the_colours_of_their_values() -> None:
    values = np.linspace(0, 1, 12).reshape(3, 4)
    cells = picture(heat_map("m", values, rows=range(3), columns=range(4)))
    assert np.abs(cells - matplotlib.colormaps["viridis"](values)).max() < 0.07  # ours is linear between nine colours
    around = picture(heat_map("m", [[0.0, 1, 1.5, 2, math.nan]], rows=["r"], columns=range(5), center=1))[0]
    assert around[1, 3] == around[4, 3] == 0  # nothing over the page's ground
    assert around[0, 3] == around[3, 3] > around[2, 3] > 0
    assert around[0, 2] > around[0, 0] and around[3, 0] > around[3, 2]  # blue below, orange above


def test_maps_hold_their_numbers_and_say_where_colours_end() -> None:
    values = np.array([[0.125, -3.0], [1e-6, 123456.0]])
    html = heat_map("m", values, rows=["x", "y"], columns=[1000, 2000], limits=(-1, 1), center=0, marked=values > 1e5)
    (data,) = Reader(html).data()
    assert np.allclose([float(v) for v in data["values"][""].split()], values.ravel(), rtol=1e-3)
    assert data["columns"] == ["1,000", "2,000"]
    assert "≤ -1" in html and "≥ 1" in html and html.count("<circle") == 1
    empty = heat_map("m", np.full((1, 2), math.nan), rows=[0], columns=[0, 1])
    assert "nan" not in re.sub(r'"values":\{[^}]*\}', "", empty)


def test_a_strip_over_time_is_small() -> None:
    loads = np.random.default_rng(0).uniform(0, 2, (256, 100))
    html = heat_map("Load", loads, rows=range(256), columns=range(100), center=1, limits=(0, 2))
    assert len(html) < 300_000


def tip(browser: Any) -> str:
    return browser.js("document.getElementById('tip').innerText")


def switch(browser: Any, name: str) -> None:
    """One of the switches at the top."""
    browser.js(f"$$('.switches label').find(one => one.textContent === '{name}').click()")


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    """A browser that shows the demonstration, and must not have found an error in the end."""

    def show(name: str = "train", **how: Any) -> Any:
        (tmp_path / "page.html").write_text(demo(name), encoding="utf-8")
        browser.open(tmp_path / "page.html", **how)
        browser.wait("document.querySelectorAll('figure.lines > svg').length === 2")
        return browser

    yield show
    assert browser.errors == []
    assert {address.split(":")[0] for address in browser.requests} <= {"file", "data"}


def test_lines_are_read_by_pointer_and_keys(opened: Any) -> None:
    browser = opened()
    chart = "figure.lines > svg"
    assert browser.js(f"document.querySelectorAll('{chart} .odd').length") == 3  # NaN; two infinities in the other
    assert browser.js(f"document.querySelectorAll('{chart} .mark, {chart} .span').length") == 2
    boxes = browser.js(f"$$('{chart} .alone').map(one => one.getBoundingClientRect().width)")
    assert boxes and min(boxes) >= 5  # a point between two that are missing can be seen
    assert browser.js("[5e-5, -5e-5, 0.00012345].map(number)") == ["5e−5", "−5e−5", "0.0001234"]
    left, width = 54, browser.js(f"document.querySelector('{chart}').clientWidth")
    browser.hover(chart, across=(left + 0.61 * (width - left - 12)) / width)
    assert tip(browser).split() == ["step", "300", "train", "2.5", "(2", "to", "2.75)", "eval", "3", "attempt", "2"]
    browser.js(f"document.querySelector('{chart}').focus()")
    browser.key("ArrowLeft")
    assert tip(browser).split() == ["step", "250", "train", "NaN", "eval", "3"]
    browser.key("Escape")
    assert tip(browser) == ""


def test_lines_are_switched(opened: Any) -> None:
    browser = opened()
    seen = "$$('figure.lines > svg').map(svg => $$('[data-series]', svg).map(one => one.dataset.series))"
    assert browser.js(seen) == [["train", "eval"], ["train", "third"]]
    first, second = browser.js("$$('[data-series=train] .line').map(line => getComputedStyle(line).stroke)")
    assert first == second
    browser.click(".legend button")
    assert browser.js(seen) == [["eval"], ["third"]]
    browser.click(".legend button")
    assert browser.js(seen) == [["train", "eval"], ["train", "third"]]
    path = "document.querySelector('figure.lines > svg .line').getAttribute('d')"
    linear = browser.js(path)
    browser.click("figcaption button")
    assert browser.js(path) != linear
    switch(browser, "tokens")
    assert "400,000" in browser.js("document.querySelector('figure.lines > svg').textContent")


def test_maps_tables_and_panels_answer(opened: Any) -> None:
    browser = opened()
    browser.hover("figure.heat image", across=0.5, down=0.25)
    assert tip(browser).split() == "layer a, expert 1 Shares 20 % band ± 2 %".split()
    browser.js("document.querySelector('figure.heat svg').focus()")
    browser.key("ArrowDown")
    assert tip(browser).split()[:7] == "layer train, expert 1 Shares – band".split()
    browser.hover(".stack i")
    assert tip(browser) == "steps: 3 s (75.0%)"
    order = "$$('tbody th').map(one => one.textContent)"
    browser.click("thead th:nth-child(2)")
    assert browser.js(order) == ["train", "d", "b", "c"]  # as numbers; without one at the end
    browser.click("thead th:nth-child(2)")
    assert browser.js(order) == ["b", "d", "train", "c"]
    panels = "$$('.panel:not([hidden])').map(one => one.textContent)"
    assert browser.js(panels) == ["panel 0", "other 0"]
    browser.js("$$('.choose input')[2].click()")
    assert browser.js(panels) == ["panel 2", "other 2"]
    browser.js("(s => { s.value = '7'; s.dispatchEvent(new Event('change')); })(document.querySelector('select'))")
    assert browser.js(panels) == ["panel 2", "other 7"]


def test_themes_and_narrow_windows(opened: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    browser = opened(dark=True, width=400)
    assert browser.js(ground) == "rgb(21, 24, 28)"
    assert browser.js("document.documentElement.scrollWidth") == 400
    switch(browser, "light")
    assert browser.js(ground) == "rgb(255, 255, 255)"


def test_no_text_runs_in_a_browser(opened: Any) -> None:
    browser = opened(NASTY)
    assert browser.js("typeof window.boomed") == "undefined"
    assert SHOWN in browser.js("document.querySelector('h1').textContent")
