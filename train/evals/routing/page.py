"""The page of `routing`: what a Mixtral's routers do, as pictures. docs/routing.md has the formulas."""

import base64
import math
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from operator import attrgetter
from pathlib import Path

import numpy as np

from mixtral_jax.train.evals.routing.result import Coloured, Domain, Liking, Result
from mixtral_jax.train.pages import (
    Section,
    Series,
    choose,
    embed,
    escape,
    figure,
    grid,
    heat_map,
    lines,
    page,
    table,
    tiles,
)

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_SEEN = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})
_FLOW_FROM = 1.2
_ROUNDING = 1e-6  # percent
_EVEN, _LOADS = "chance, even loads", "chance, these loads"
Value = Callable[[Domain], np.ndarray]


def render(result: Result) -> str:
    """One file of HTML with everything in the result, for a browser without network."""
    parts = [_overview, _changed, _shares, _repetition, _texts, _likings, _together, _health]
    if result.all.changed is None:
        parts.remove(_changed)
    if result.top_k == len(result.layers) == 1:
        parts.remove(_together)
    place = [name for name in Path(result.checkpoint).parts if name != "checkpoints"]
    return page(
        f"Routing of {'/'.join(place[-2:])}",
        [part(result) for part in parts],
        subtitle=f"{result.experts} experts, {result.top_k} a token · {result.checkpoint}",
        axes={"layers": {"layer": result.layers}},
        script=files("mixtral_jax.train.evals.routing").joinpath("texts.js").read_text("utf-8"),
    )


def _overview(result: Result) -> Section:
    last, all_ = result.layers[-1], result.all
    numbers: dict[str, str | float] = {
        "tokens": all_.tokens,
        "documents": all_.documents,
        "layers": f"{len(result.layers)} of {result.model_layers}",
        "context, tokens": result.seq_len,
        f"same expert for neighbours, layer {last}": f"{all_.repeat_first_L[-1]:.1%}",
        "by chance": f"{result.chance_first:.1%}",
        "largest load / mean": f"{all_.load_max_L.max():.2f}",
        "dead experts": int(all_.dead_L.sum()),
    }
    notes = [f'<p class="note">{escape(note)}</p>' for note in result.notes]
    lead = (
        "What the routers choose for these texts, from the model's own forward pass. Bands are 95 % intervals over "
        "documents, since tokens of one document are not independent. Layers and experts count from 0."
    )
    return Section("At a glance", lead, [*notes, tiles(numbers)])


def _changed(result: Result) -> Section:
    kinds = {
        "Another first choice, %": "first_L",
        "Another set of choices, %": "any_L",
        "Gate moved to other experts, %": "gate_L",
    }
    values = {title: _percent(f"changed.{key}") for title, key in kinds.items()}
    rows: list[list[str | float]] = [
        [each.name, *(float(value(each).mean()) for value in values.values())] for each in (*result.domains, result.all)
    ]
    charts = [lines(title, _by_layer(result, value)) for title, value in values.items()]
    lead = (
        f"Beside {result.against}, on the same tokens: the share whose first expert or set of experts is another, "
        "and how much of the gates has moved, half the sum of |gate − gate before| over the experts. The table has the "
        "mean over layers."
    )
    return Section("What has changed", lead, [table(["domain", *values], rows, decimals=1), grid(charts)])


def _shares(result: Result) -> Section:
    even = 100 / result.experts
    views: dict[str, Callable[[Domain], tuple[np.ndarray, np.ndarray]]] = {
        f"{ordinal} choice": partial(_choice, c) for c, ordinal in enumerate(_ORDINALS[: result.top_k])
    }
    if result.top_k > 1:
        views["all choices"] = lambda d: (d.either_LE, d.either_band_LE)
    options = {}
    for view, values_of in views.items():
        values = [(each, *values_of(each)) for each in (*result.domains, result.all)]
        values = [(each, 100 * share, 100 * band) for each, share, band in values]
        far = min(even, max(_ROUNDING, *(np.abs(share - even).max() for _, share, _ in values)))
        maps = [
            heat_map(
                f"{each.name}: {each.tokens:,} tokens of {each.documents:,} documents",
                share, rows=result.layers, columns=range(result.experts), unit=" %", center=even,
                limits=(even - far, even + far), also={"95 % band ±": band}, marked=np.abs(share - even) > band,
            )
            for each, share, band in values
        ]  # fmt: skip
        options[view] = grid(maps, _room(result))
    lead = (
        f"Percent of a domain's tokens that go to each expert: an even share is {even:.3g} %, orange is more, blue is "
        "less, and a dot says that an even share lies outside the 95 % band. Figure 7 of the paper (2401.04088) "
        "shows three layers."
    )
    return Section("Who gets the tokens", lead, [choose("choice", options)])


def _room(result: Result) -> int:
    """Pixels for a map whose columns are experts."""
    return min(660, max(250, 36 + 38 * result.experts))


def _choice(c: int, each: Domain) -> tuple[np.ndarray, np.ndarray]:
    return each.share_LCE[:, c], each.share_band_LCE[:, c]


def _repetition(result: Result) -> Section:
    kinds = (
        ("Same first choice", "repeat_first", "loads_first", result.chance_first),
        ("An expert in common", "repeat_any", "loads_any", result.chance_any),
    )[: min(result.top_k, 2)]
    at = sorted({0, len(result.layers) // 2, len(result.layers) - 1})
    tables, charts = [], []
    for title, key, loads, chance in kinds:
        rows: list[list[str | float]] = []
        strong: set[tuple[int, int]] = set()
        for i, each in enumerate((*result.domains, result.all)):
            share, band, drawn = (getattr(each, f"{own}_L") for own in (key, f"{key}_band", loads))
            rows.append([each.name, *(100 * share[at])])
            above = share - band > np.fmax(drawn, chance)
            strong |= {(i, j) for j, layer in enumerate(at, 1) if above[layer]}
        by_loads = getattr(result.all, f"{loads}_L")
        levels = {_EVEN: np.full_like(by_loads, 100 * chance), _LOADS: 100 * by_loads}
        levels = {name: level_L for name, level_L in levels.items() if not np.isnan(level_L).any()}
        rows += [[name, *level_L[at]] for name, level_L in levels.items()]
        heads = ["domain", *(f"layer {result.layers[i]}" for i in at)]
        tables.append(table(heads, rows, caption=f"{title}, %", strong=strong, decimals=1))
        series = _by_layer(result, _percent(f"{key}_L"), _percent(f"{key}_band_L"))
        series += [Series(name, "layers", level_L) for name, level_L in levels.items()]
        charts.append(lines(f"{title}, by layer", series, unit=" %"))
    lead = (
        "How often a token and the next one of its document meet the same first expert, or share one of all their "
        f"experts: table 5 of the Mixtral paper. By chance that is 1/E = {result.chance_first:.1%} and "
        f"1 − C(E−k, k)/C(E, k) = {result.chance_any:.1%} with even loads, and more where some experts are chosen more "
        "often. Bold: above both by more than the 95 % band."
    )
    return Section("Neighbours meet the same expert", lead, [grid(tables), grid(charts, 480)])


def _texts(result: Result) -> Section:
    texts = [_compact(each) for each in result.texts]
    data = {"layers": result.layers, "experts": result.experts, "k": result.top_k, "texts": texts}
    lead = (
        "Each token stands on the colour of its first expert, as in the paper's figure 8. The pointer, or the left and "
        "right arrow keys in a text, read all experts of a token with their gates; up and down go through the layers. "
        "A click on an expert shows it alone."
    )
    return Section("Text by expert", lead, [figure("texts", "", embed(data))])


def _compact(text: Coloured) -> dict[str, object]:
    """Experts, and gates in thousandths, as 16 bits each, little-endian, in base64."""
    arrays = {"expert": text.expert_LNC, "gate": np.rint(1000 * text.gate_LNC)}
    coded = {name: base64.b64encode(values.astype("<u2").tobytes()).decode() for name, values in arrays.items()}
    return {"domain": text.domain, "pieces": text.pieces, "control": text.control, **coded}


def _likings(result: Result) -> Section:
    options = {}
    for layer, experts in zip(result.layers, result.likings, strict=True):
        rows = "".join(
            f'<tr><th scope="row" class="right">{expert}</th><td class="c{expert % 8}">'
            f"{''.join(map(_piece, likings)) or '–'}</td></tr>"
            for expert, likings in enumerate(experts)
        )
        options[str(layer)] = figure("table", "", f"<table><tbody>{rows}</tbody></table>")
    lead = (
        "The tokens that have an expert as their first choice more often than others have; the number is the lift "
        "P(expert | token) / P(expert), smoothed by 10 tokens that go where all go, of tokens that go there 5 times or "
        "more. Its logarithm is the pointwise mutual information. ␣ is a space, ↵ the end of a line."
    )
    return Section("What each expert likes", lead, [choose("layer", options)])


def _piece(liking: Liking) -> str:
    said = f"{liking.count:,} of {liking.total:,} such tokens go here first; id {liking.id}"
    shown = f"{escape(liking.piece.translate(_SEEN))} <small>{liking.lift:.1f}</small>"
    return f'<span class="piece" tabindex="0" data-tip="{said}">{shown}</span>'


def _together(result: Result) -> Section:
    options = {}
    for i, layer in enumerate(result.layers):
        maps = []
        if result.top_k > 1:
            pairs = result.together_ratio_LEE[i], result.together_LEE[i]
            maps.append(_relation(f"Pairs in layer {layer}", *pairs, ("expert", "with expert")))
        if i < len(result.layers) - 1:
            after, paths = result.layers[i + 1], (result.paths_ratio_LEE[i], result.paths_LEE[i])
            names = (f"expert of layer {layer}", f"of layer {after}")
            maps.append(_relation(f"Paths from layer {layer} to {after}", *paths, names))
        if maps:
            options[str(layer)] = grid(maps, _room(result))
    lead = (
        "How often two experts are chosen for one token, and how often a first choice is followed by another in the "
        "next layer, divided by what is expected of their loads alone: 1 is no relation, 2 is twice as often."
    )
    flow = [_flow(result)] if len(result.layers) > 1 else []
    return Section("Who works with whom", lead, [*flow, choose("layer", options)])


def _relation(title: str, ratio_EE: np.ndarray, tokens_EE: np.ndarray, names: tuple[str, str]) -> str:
    """Observed / expected."""
    experts, also = range(len(ratio_EE)), {"tokens": tokens_EE}
    return heat_map(title, ratio_EE, rows=experts, columns=experts, names=names, center=1, limits=(0, 2), also=also)


def _flow(result: Result) -> str:
    """The paths that are taken most above expectation, as curves from layer to layer."""
    across = min(220, max(76, 900 // max(1, len(result.layers) - 1)))
    down = 22 if result.experts <= 16 else 12
    links = []
    for i, (paths_EE, ratio_EE) in enumerate(zip(result.paths_LEE, result.paths_ratio_LEE, strict=True)):
        share_EE, ratio_EE = paths_EE / max(paths_EE.sum(), 1), np.nan_to_num(ratio_EE)
        above_EE = np.where(ratio_EE > _FLOW_FROM, share_EE * (1 - 1 / np.maximum(ratio_EE, 1)), 0)
        best = np.unravel_index(np.argsort(-above_EE, axis=None)[: 2 * result.experts], above_EE.shape)
        links += [(i, e, f, share_EE[e, f], ratio_EE[e, f]) for e, f in zip(*best, strict=True) if above_EE[e, f] > 0]
    widest, drawn = max((share for *_, share, _ in links), default=1.0), ""
    for i, e, f, share, ratio in links:
        said = f"layer {result.layers[i]} expert {e} to layer {result.layers[i + 1]} expert {f}: "
        said += f"{share:.1%} of tokens, {ratio:.1f} times as expected"
        x, y, z = 40 + across * i, 20 + down * e, 20 + down * f
        curve = f"M{x + 9} {y}C{x + across / 2:g} {y} {x + across / 2:g} {z} {x + across - 9} {z}"
        drawn += f'<path class="c{e % 8}" d="{curve}" stroke-width="{1 + 7 * share / widest:.1f}" data-tip="{said}"/>'
    for i, layer in enumerate(result.layers):
        column = [(24 + down * e, str(e)) for e in range(result.experts)]
        for y, text in (*column, (30 + down * result.experts, f"layer {layer}")):
            drawn += f'<text x="{40 + across * i}" y="{y}">{text}</text>'
    width, height = 80 + across * (len(result.layers) - 1), 36 + down * result.experts
    title = f"Paths that are taken more than {_FLOW_FROM:g} times as often as expected"
    return figure(
        "flow", title, f'<svg width="{width}" height="{height}" role="img" aria-label="{title}">{drawn}</svg>'
    )


def _health(result: Result) -> Section:
    charts: dict[str, Value] = {
        f"Entropy of the router, nats (at most {math.log(result.experts):.3g})": lambda d: d.entropy_L,
        "Mean gate of the first choice": lambda d: d.gate_LC[:, 0],
        "Largest logit minus the next": lambda d: d.gap_L,
        "Largest load / mean load": lambda d: d.load_max_L,
        "Deviation of loads / mean load": lambda d: d.load_cv_L,
        "Experts that no token chose": lambda d: d.dead_L,
        f"Dropped at a capacity factor of {result.capacity_factor:g}, %": _percent("dropped_L"),
    }
    own = "is the run's own" if result.capacity_is_own else "is no setting of this model, but shows what one would cost"
    lead = (
        "Low entropy, a large gap and a gate near 1 are a router that is sure. Loads count all choices: 1 is even. The "
        f"capacity factor, of batches of {result.capacity_tokens:,} tokens, {own}."
    )
    drawn = [lines(title, _by_layer(result, value)) for title, value in charts.items()]
    return Section("How sure, and how even", lead, [grid(drawn)])


def _percent(key: str) -> Value:
    return lambda d: 100 * attrgetter(key)(d)


def _by_layer(result: Result, value: Value, band: Value = lambda _: np.array(np.nan)) -> list[Series]:
    """A line for each domain, with its band where that is known."""
    series = []
    for each in result.domains:
        middle, half = value(each), band(each)
        edges = (None, None) if np.isnan(half).any() else (middle - half, middle + half)
        series.append(Series(each.name, "layers", middle, *edges))
    return series
