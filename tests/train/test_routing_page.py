"""The routers' page: its numbers are the result's, and a reader can go through texts and layers."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_jax.train.evals.routing.page import render
from mixtral_jax.train.evals.routing.result import Changed, Coloured, Domain, Liking, Result
from mixtral_jax.train.pages import charts
from tests.train.test_pages import NASTY, SHOWN, Reader, tip

PIECES = ("<s>", " the", " cat", "\n", "", "日", NASTY)


def result(
    layers: int = 3, experts: int = 8, top_k: int = 2, names: tuple[str, ...] = ("code", NASTY),
    *, against: bool = True, documents: int = 9,
) -> Result:  # fmt: skip
    """Numbers drawn at random, of every kind that there is."""
    rng = np.random.default_rng(0)
    band = 0.02 if documents > 1 else np.nan

    def domain(name: str) -> Domain:
        share_LCE = rng.dirichlet(np.full(experts, 5), size=(layers, top_k))
        either_LE, ones = share_LCE.mean(1), np.ones(layers)
        keys = "repeat_first repeat_any loads_first entropy gap load_max load_cv dropped".split()
        each = {f"{key}_L": rng.random(layers) for key in keys}
        bands = np.full_like(share_LCE, band), np.full_like(either_LE, band)
        return Domain(
            name, 5000, documents, 4900, share_LCE, bands[0], either_LE, bands[1],
            repeat_first_band_L=band * ones, repeat_any_band_L=band * ones, loads_any_L=np.nan * ones,
            gate_LC=rng.random((layers, top_k)), dead_L=np.zeros(layers, int),
            changed=Changed(*rng.random((3, layers))) if against else None, **each,
        )  # fmt: skip

    def text(name: str) -> Coloured:
        expert_LNE = np.argsort(rng.random((layers, len(PIECES), experts)), axis=-1)
        return Coloured(name, PIECES, (0,), expert_LNE[..., :top_k], rng.random((layers, len(PIECES), top_k)).round(3))

    tokens = rng.integers(0, 99, (2, layers, experts, experts))
    ratios = np.where(rng.random(tokens.shape) < 0.1, np.nan, rng.uniform(0, 3, tokens.shape))
    likings = tuple(
        tuple((Liking(5, piece, 30, 40, 2.345),) if expert else () for expert in range(experts))
        for piece in (PIECES * 5)[:layers]
    )
    return Result(
        f"runs/{NASTY}", "runs/base" if against else None, experts, top_k, layers + 1, tuple(range(1, layers + 1)), 64,
        5000, 1.25, False, 1024, 1 / experts, 0.46, (NASTY,), tuple(map(domain, names)), domain("all"), likings,
        tokens[0], ratios[0], tokens[1, 1:], ratios[1, 1:], tuple(text(name) for name in names for _ in range(2)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 1, "against": False},
        {"experts": 16, "top_k": 4, "documents": 1},
        {"layers": 1, "experts": 64},
        {"layers": 1, "top_k": 1},
    ],
    ids=["eight", "one choice", "four choices", "one layer", "one of both"],
)
def test_the_numbers_are_the_results(changes: dict[str, Any]) -> None:
    given = result(**changes)
    read = Reader(render(given))
    data = {one["title"]: one for one in read.data() if "title" in one}
    maps = [one for one in read.data() if "box" in one]
    views = [np.moveaxis(d.share_LCE, 1, 0) for d in (*given.domains, given.all)]
    for c in range(given.top_k):
        for i, expected in enumerate(views):
            shown = [float(v) for v in maps[c * len(views) + i]["values"][""].split()]
            np.testing.assert_allclose(shown, 100 * expected[c].ravel(), rtol=1e-3)
    for name, key in (("Same first choice, by layer", "repeat_first_L"), ("Largest load / mean load", "load_max_L")):
        for series, each in zip(data[name]["series"], given.domains, strict=False):
            scale = 100 if "repeat" in key else 1
            np.testing.assert_allclose(series["y"], scale * getattr(each, key), rtol=1e-4)
    (texts,) = (one["texts"] for one in read.data() if "texts" in one)
    for shown, text in zip(texts, given.texts, strict=True):
        assert tuple(shown["pieces"]) == text.pieces
        for key, expected in (("expert", text.expert_LNC), ("gate", 1000 * text.gate_LNC)):
            np.testing.assert_array_equal(np.frombuffer(base64.b64decode(shown[key]), "<u2"), np.rint(expected).ravel())
    assert ("Beside runs/base" in render(given)) is (given.against is not None)
    assert any(title.startswith("Pairs in layer") for title in data) is (given.top_k > 1)
    assert any(title.startswith("Paths from layer") for title in data) is (len(given.layers) > 1)


def test_the_table_marks_what_is_above_chance() -> None:
    given = result()
    table = re.search(r"Same first choice, %</figcaption>(.*?)</table>", render(given), re.S)
    assert table
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table[1])
    assert [name for name, _ in rows][-3:] == ["all", "chance, even loads", "chance, these loads"]
    unknown = re.search(r"An expert in common, %</figcaption>(.*?)</table>", render(given), re.S)
    assert unknown and "chance, even loads" in unknown[1] and "chance, these loads" not in unknown[1]
    for each, (_, cells) in zip((*given.domains, given.all), rows[:-2], strict=True):
        for layer, cell in enumerate(re.findall(r"<td[^>]*>(.*?)</td>", cells)):
            share = each.repeat_first_L[layer]
            above = share - 0.02 > max(each.loads_first_L[layer], given.chance_first)
            assert cell == (f"<strong>{100 * share:.1f}</strong>" if above else f"{100 * share:.1f}")


def test_shares_that_are_even_are_no_deviation() -> None:
    """Where all experts are chosen; the last digits differ."""
    given = result(experts=2, top_k=2, names=("a",))
    shares = 0.5 + np.tile([1e-16, -1e-16], (3, 1))
    domain, all_ = (replace(each, either_LE=shares) for each in (*given.domains, given.all))
    maps = render(replace(given, domains=(domain,), all=all_))
    assert maps.count(charts._picture(np.full((3, 2), 127, np.uint8), True)) == 2


def test_a_large_model_makes_a_page_of_some_megabytes() -> None:
    assert len(render(result(32, names=tuple("abcdef")))) < 2_000_000


def test_texts_are_read_through_the_layers(browser: Any, tmp_path: Path) -> None:
    given = result()
    (tmp_path / "page.html").write_text(render(given), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    browser.wait("$$('figure.lines > svg').length === $$('figure.lines').length")
    assert browser.js("typeof window.boomed") == "undefined"
    assert SHOWN in browser.js("document.querySelector('.note').textContent")

    def said(layer: int, token: int) -> list[str]:
        text = given.texts[0]
        pairs = zip(text.expert_LNC[layer, token], text.gate_LNC[layer, token], strict=True)
        head = f"{json.dumps(PIECES[token], ensure_ascii=False)}, layer {given.layers[layer]}"
        return [head, *(f"expert {expert} {gate:.3f}" for expert, gate in pairs)]

    def shown() -> list[str]:
        words = "[...one.childNodes].map(child => child.textContent).join(' ')"
        return browser.js(f"$$('#tip strong, #tip div').map(one => {words})")

    assert browser.js("$$('.tokens b').length") == 2 * len(PIECES)
    browser.hover(".tokens b:nth-child(2)")
    assert shown() == said(1, 1)
    browser.js("document.querySelector('.tokens').focus()")
    for _ in range(3):
        browser.key("ArrowRight")
    assert shown() == said(1, 2)
    browser.key("ArrowUp")
    assert shown() == said(0, 2)
    colour = f"c{given.texts[0].expert_LNC[0, 2, 0]}"
    assert browser.js("document.querySelector('[data-here]').className").split()[0] == colour
    browser.click(f".experts .{colour}")
    alone = int((given.texts[0].expert_LNC[0, :, 0] == int(colour[1:])).sum())
    assert browser.js("document.querySelectorAll('.tokens')[0].querySelectorAll('b:not(.dim)').length") == alone
    browser.js("$$('.choose[data-label=layer] input')[1].click()")
    panels = "$$('.choose[data-label=layer] > .panel:not([hidden])').map(panel => panel.dataset.name)"
    assert browser.js(panels) == ["2", "2"]
    browser.hover(".panel:not([hidden]) .piece")
    assert "of 40 such tokens" in tip(browser)
    assert browser.errors == []
    assert {address.split(":")[0] for address in browser.requests} <= {"file", "data"}
