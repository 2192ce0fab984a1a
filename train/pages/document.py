"""A page of HTML: sections with a table of contents, tables, tiles, and what shows one of several at a time.

What is text is escaped here; what is called `html` has come out of a function of this room.
"""

import html as markup
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

# Control characters, which HTML does not allow, as their pictures.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
Cell = str | float | None


@dataclass(frozen=True)
class Section:
    """A heading, one or two sentences that say what is shown and how to read it, and html beneath."""

    title: str
    lead: str
    html: Sequence[str]


def escape(text: object) -> str:
    """The text as HTML, in an attribute too: control characters are seen, halves of surrogate pairs become U+FFFD."""
    whole = str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return markup.escape(whole.translate(_PICTURES))


def embed(data: object, **attributes: str) -> str:
    """Data for the script, as JSON that no text in it can end."""
    names = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json"{names}>{text}</script>'


def short(value: float | None) -> float | int | str | None:
    """A number for the script with 5 significant digits; NaN and infinities, which JSON has not, by name."""
    if value is None or isinstance(value, int):
        return value
    if not math.isfinite(value):
        return str(float(value))
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded.is_integer() else rounded


def number(value: Cell) -> str:
    """A number for people: whole ones in full up to a million, others with 4 significant digits; nothing for None."""
    if value is None or isinstance(value, str):
        return value or ""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.4g}{prefix}".replace("-", "−")
    whole = float(value).is_integer() or abs(value) >= 1e4
    return (f"{value:,.0f}" if whole else f"{value:.4g}".replace("e-0", "e-")).replace("-", "−")


def page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    axes: Mapping[str, Any] | None = None,
    script: str = "",
) -> str:
    """The whole file.

    `axes` has the places along x for the series of `lines`: {axis: {"step": [...], "tokens": [...]}}; the kinds of x
    are the same in all of them, and one switch at the top chooses among them for all charts. `script` is code of the
    page's own, run after the kit's.
    """
    here = files("mixtral_jax.train.pages")
    style, kit, draw = (here.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js", "lines.js"))
    short_axes = {
        axis: {kind: [round(x, 1) if kind == "step" else short(x) for x in places] for kind, places in kinds.items()}
        for axis, kinds in (axes or {}).items()
    }
    contents = "".join(f'<li><a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections, 1))
    body = "".join(
        f'<section id="s{i}" aria-labelledby="h{i}"><h2 id="h{i}">{escape(section.title)}</h2>'
        f'<p class="lead">{escape(section.lead)}</p>{"".join(section.html)}</section>\n'
        for i, section in enumerate(sections, 1)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>\n{style}</style></head>\n<body>'
        f'<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><div class="switches"></div></header>\n'
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n<main>\n{body}</main>\n'
        "<noscript><p>Line charts are drawn by this page's script, which is switched off here.</p></noscript>"
        f"{embed(short_axes, id='axes')}<script>\n{kit}{draw}{script}</script></body></html>\n"
    )


def figure(kind: str, caption: str, html: str) -> str:
    """Something drawn, with its caption above."""
    heading = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{heading}{html}</figure>\n'


def grid(html: Sequence[str], least: int | None = None) -> str:
    """Side by side as many as fit with `least` pixels each; None: what is around it says, or 340."""
    style = f' style="--least:{least}px"' if least else ""
    return f'<div class="grid"{style}>{"".join(html)}</div>'


def choose(label: str, options: Mapping[str, str]) -> str:
    """One of several at a time; the reader chooses by the options' names. The same label moves together."""
    panels = "".join(
        f'<div class="panel" data-name="{escape(name)}"{" hidden" if i else ""}>{html}</div>'
        for i, (name, html) in enumerate(options.items())
    )
    return f'<div class="choose" data-label="{escape(label)}">{panels}</div>'


def details(title: str, html: str) -> str:
    """Closed until it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def tiles(values: Mapping[str, Cell]) -> str:
    """The few numbers to see first."""
    each = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(number(v))}</dd></div>" for name, v in values.items())
    return f'<dl class="tiles">{each}</dl>'


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    caption: str = "",
    strong: Collection[tuple[int, int]] = (),
    sortable: bool = False,
    decimals: int | None = None,
) -> str:
    """Rows whose first cell names them; numbers stand at the right. `strong`: (row, column) of cells that stand out."""
    right = [any(isinstance(row[j], int | float) for row in rows) for j in range(len(columns))]
    named = zip(columns, right, strict=True)
    head = "".join(f'<th scope="col"{" class=right" * at_right}>{escape(name)}</th>' for name, at_right in named)
    body = ""
    for i, row in enumerate(rows):
        cells = ""
        for j, cell in enumerate(row):
            tag, scope = ("th", ' scope="row"') if j == 0 else ("td", "")
            value = "" if isinstance(cell, str | None) else f' data-value="{float(cell)!r}"'
            text = escape(number(cell) if decimals is None or not isinstance(cell, float) else f"{cell:.{decimals}f}")
            text = f"<strong>{text}</strong>" if (i, j) in strong else text
            cells += f"<{tag}{scope}{value}{' class=right' * right[j]}>{text}</{tag}>"
        body += f"<tr>{cells}</tr>"
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return figure("table", caption, f"<table{' class=sortable' if sortable else ''}>{inner}</table>")
