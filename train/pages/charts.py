"""Charts: lines, which the script draws so that axis and scale can be switched, heat maps, and stacked bars."""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mixtral_jax.train.pages.document import embed, escape, figure, number, short

# viridis at six places; between them linear (van der Walt and Smith, 2015)
_VIRIDIS = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))
_BELOW, _ABOVE = (0, 114, 178), (230, 97, 0)
_WIDEST_CELL, _MAP_WIDTH, _TEXT_FROM = 38, 608, 30


@dataclass(frozen=True)
class Series:
    """One line: y at the places of `axis` (page(axes=...)), with a band from low to high.

    None is a gap; NaN and infinities are marked at the edge. Series of one name have one colour and are shown or
    hidden together on the whole page.
    """

    name: str
    axis: str
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Mark:
    """A line across a chart at x, or a shaded range up to `until`, both {kind of x: place}."""

    text: str
    x: Mapping[str, float]
    until: Mapping[str, float] | None = None


def lines(
    title: str, series: Sequence[Series], *, unit: str = "", log: bool | None = None, marks: Sequence[Mark] = ()
) -> str:
    """Lines with a cross-hair that reads all of them; `log`: how y begins where it can be switched, None: linear.

    A series of a single finite value in a chart is a dot.
    """
    data: dict[str, Any] = {"title": title, "unit": unit, "log": log, "series": [], "marks": []}
    for one in series:
        values = {"y": one.y, "low": one.low, "high": one.high}
        short_values = {key: [short(v) for v in part] for key, part in values.items() if part is not None}
        data["series"].append({"name": one.name, "axis": one.axis, **short_values})
    for mark in marks:
        places = {"x": mark.x, "until": mark.until}
        data["marks"].append({"text": mark.text, **{k: dict(place) for k, place in places.items() if place}})
    return figure("lines", title, embed(data))


def heat_map(
    title: str,
    values: Sequence[Sequence[float]] | np.ndarray,
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    names: tuple[str, str] = ("layer", "expert"),
    unit: str = "",
    center: float | None = None,
    limits: tuple[float, float] | None = None,
    also: Mapping[str, Sequence[Sequence[float]] | np.ndarray] | None = None,
    marked: np.ndarray | None = None,
) -> str:
    """Values [row, column] as colours, with the numbers where they have room and on hover.

    With `center` two colours that grow with the distance from it, else viridis. Missing values are NaN. `also` has
    more numbers of each cell for the hover; cells of `marked` (bool) have a dot.
    """
    grid = np.asarray(values, float)
    low, high = limits or _limits(grid, center)
    count, wide = grid.shape
    width = min(_WIDEST_CELL, _MAP_WIDTH / max(wide, 1))
    cell = (width, 18 if width >= _TEXT_FROM else max(2, min(18, 480 // count)))
    left = 8 + 7 * max((len(str(row)) for row in rows), default=0)
    size = (left + cell[0] * wide + 2, 4 + cell[1] * count + 34)
    image = f'<image href="{_picture(_levels(grid, low, high), center is not None)}" x="{left}" y="4" width="{cell[0] * wide:g}" '
    image += f'height="{cell[1] * count}" preserveAspectRatio="none"/>'
    labels = _labels(rows, columns, names, left, cell)
    texts = _cell_texts(grid, (low, high), center is not None, left, cell) if cell[0] >= _TEXT_FROM else ""
    dots = "".join(
        f'<circle cx="{left + (c + 1) * cell[0] - 4:g}" cy="{4 + r * cell[1] + 4:g}" r="2"/>'
        for r, c in (np.argwhere(marked) if marked is not None else ())
    )
    data = {
        "title": title,
        "rows": [str(row) for row in rows],
        "columns": [str(column) for column in columns],
        "names": names,
        "unit": unit,
        "box": [left, 4, cell[0], cell[1]],
        "values": {"": _flat(grid), **{name: _flat(np.asarray(more, float)) for name, more in (also or {}).items()}},
    }
    drawn = (
        f'<svg role="img" tabindex="0" aria-label="{escape(title)}: {escape(names[0])} by {escape(names[1])}, '
        f'{escape(number(low))} to {escape(number(high))}{escape(unit)}" width="{size[0]:g}" height="{size[1]:g}" '
        f'viewBox="0 0 {size[0]:g} {size[1]:g}">{image}{texts}{dots}{labels}</svg>'
    )
    ramp = _picture(np.arange(0, 255, dtype=np.uint8)[None], center is not None)
    key = f'<div class="key">{escape(number(low))}<img alt="" src="{ramp}">{escape(number(high))}{escape(unit)}</div>'
    return figure("heat", title, drawn + key + embed(data))


def stacked(title: str, rows: Mapping[str, Mapping[str, float]], *, unit: str = "") -> str:
    """A bar for each row, divided in its parts, whose shares are said in words too."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    html = ""
    for name, row in rows.items():
        total = math.fsum(row.values()) or 1.0
        pieces = ""
        for part, value in row.items():
            said = escape(f"{part}: {number(value)}{unit} ({value / total:.1%})")
            pieces += (
                f'<i style="flex-grow:{value:.4g}" class="c{parts.index(part) % 8}" tabindex="0" data-tip="{said}"></i>'
            )
        html += f'<div class="stack"><b>{escape(name)}</b><span>{pieces}</span></div>'
    legend = "".join(f'<li><i class="c{i % 8}"></i>{escape(part)}</li>' for i, part in enumerate(parts))
    return figure("stacked", title, f'{html}<ul class="legend">{legend}</ul>')


def _limits(grid: np.ndarray, center: float | None) -> tuple[float, float]:
    finite = grid[np.isfinite(grid)]
    if not finite.size:
        return 0.0, 1.0
    if center is None:
        return float(finite.min()), float(finite.max())
    far = float(np.abs(finite - center).max()) or 1.0
    return center - far, center + far


def _levels(grid: np.ndarray, low: float, high: float) -> np.ndarray:
    """The colour of each cell, 0 to 254; 255 where there is no value."""
    scaled = np.clip((grid - low) / ((high - low) or 1.0), 0, 1) * 254
    return np.where(np.isnan(grid), 255, np.nan_to_num(scaled).round()).astype(np.uint8)


def _palette(diverging: bool) -> list[tuple[int, int, int, int]]:
    """Red, green, blue, alpha of 256 levels; around the center the page's own ground shines through."""
    if diverging:
        ramp = [(*(_BELOW if i < 127 else _ABOVE), round(200 * abs(i - 127) / 127)) for i in range(255)]
    else:
        at = np.linspace(0, len(_VIRIDIS) - 1, 255)
        channels = [np.interp(at, range(len(_VIRIDIS)), channel) for channel in zip(*_VIRIDIS, strict=True)]
        ramp = [(round(r), round(g), round(b), 255) for r, g, b in zip(*channels, strict=True)]
    return [*ramp, (0, 0, 0, 0)]


def _picture(levels: np.ndarray, diverging: bool) -> str:
    """A PNG (ISO/IEC 15948) with a palette as an address: a byte a cell before it is compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    palette = _palette(diverging)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 8, 3, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    parts = (
        (b"IHDR", header),
        (b"PLTE", bytes(value for colour in palette for value in colour[:3])),
        (b"tRNS", bytes(colour[3] for colour in palette)),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    whole = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)
    return f"data:image/png;base64,{base64.b64encode(whole).decode()}"


def _flat(grid: np.ndarray) -> str:
    """Row by row with 4 significant digits: `.125 nan 3`."""
    return " ".join(f"{value:.4g}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.4g}" for value in grid.flat)


def _cell_texts(
    grid: np.ndarray, limits: tuple[float, float], diverging: bool, left: int, cell: tuple[float, int]
) -> str:
    low, high = limits
    html = ""
    for (r, c), value in np.ndenumerate(grid):
        place = f'x="{left + (c + 0.5) * cell[0]:g}" y="{4 + r * cell[1] + 13}"'
        ground = "" if diverging else f' class="on-{"dark" if value - low < 0.55 * (high - low) else "light"}"'
        html += f"<text {place}{ground}>{escape(f'{value:.3g}'.replace('-', '−'))}</text>"
    return f'<g class="cells">{html}</g>'


def _labels(
    rows: Sequence[object], columns: Sequence[object], names: tuple[str, str], left: int, cell: tuple[float, int]
) -> str:
    """As many of the names as have room."""
    bottom = 4 + cell[1] * len(rows)
    every = max(1, math.ceil(14 / cell[1]))
    html = "".join(
        f'<text x="{left - 5}" y="{4 + (r + 0.5) * cell[1] + 4:g}" text-anchor="end">{escape(row)}</text>'
        for r, row in enumerate(rows)
        if r % every == 0
    )
    widest = max((len(str(column)) for column in columns), default=1)
    every = max(1, math.ceil((7 * widest + 6) / cell[0]))
    html += "".join(
        f'<text x="{left + (c + 0.5) * cell[0]:g}" y="{bottom + 14}" text-anchor="middle">{escape(column)}</text>'
        for c, column in enumerate(columns)
        if c % every == 0
    )
    middle = left + cell[0] * len(columns) / 2
    return f'{html}<text class="name" x="{middle:g}" y="{bottom + 30}" text-anchor="middle">{escape(names[1])}</text>'
