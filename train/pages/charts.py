"""Charts: lines, which the script draws so that axis and scale can be switched, heat maps, and stacked bars."""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixtral_jax.train.pages.document import embed, escape, figure, number, short

# viridis (van der Walt and Smith, 2015) at nine places; between them linear
_VIRIDIS = (
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
    (173, 220, 48), (253, 231, 37),
)  # fmt: skip
_BELOW, _ABOVE = (0, 114, 178), (230, 97, 0)
_WIDEST_CELL, _TEXT_FROM = 38, 30  # pixels
_SHARP = 8  # dots of a picture to a cell: programs that show PDF blur the borders of dots
Values = Sequence[float | None] | np.ndarray
Box = tuple[float, float, float, float]  # left and top of a map, width and height of a cell


@dataclass(frozen=True)
class Series:
    """One line: y at the places of `axis` (page(axes=...)), with a band from low to high.

    None is a gap; NaN and infinities are marked at the edge. Series of one name have one colour and are shown or
    hidden together on the whole page.
    """

    name: str
    axis: str
    y: Values
    low: Values | None = None
    high: Values | None = None


@dataclass(frozen=True)
class Mark:
    """A line across a chart at x, or a shaded range up to `until`, both {kind of x: place}."""

    text: str
    x: Mapping[str, float]
    until: Mapping[str, float] | None = None


def lines(
    title: str, series: Sequence[Series], *, unit: str = "", log: bool | None = None, marks: Sequence[Mark] = ()
) -> str:
    """Lines with a cross-hair that reads all of them; `log`: how y begins where it can be switched, None: linear."""
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
    rows: Sequence[str | float],
    columns: Sequence[str | float],
    names: tuple[str, str] = ("layer", "expert"),
    unit: str = "",
    center: float | None = None,
    limits: tuple[float, float] | None = None,
    also: Mapping[str, Sequence[Sequence[float]] | np.ndarray] | None = None,
    marked: np.ndarray | None = None,
    width: int = 608,
) -> str:
    """Values [row, column] as colours, with the numbers where they have room and on hover.

    With `center`, from which `limits` are equally far, two colours that grow with the distance from it, else viridis.
    Missing values are NaN. `also` has more numbers of each cell for the hover; cells of `marked` (bool) have a dot. No
    wider than `width` pixels, and the names.
    """
    grid = np.asarray(values, float)
    low, high = limits or _limits(grid, center)
    row_names, column_names = (
        [each if isinstance(each, str) else number(each) for each in side] for side in (rows, columns)
    )
    wide = min(_WIDEST_CELL, width / max(len(columns), 1))
    left = 8 + 7 * max(map(len, row_names), default=0)
    box = (left, 4, wide, 18 if wide >= _TEXT_FROM else max(2, min(18, 480 // max(len(rows), 1))))
    right, bottom = left + wide * len(columns), 4 + box[3] * len(rows)
    picture = _picture(_levels(grid, low, high), center is not None)
    drawn = f'<image href="{picture}" x="{left}" y="4" width="{right - left:g}" height="{bottom - 4}" '
    drawn += f'preserveAspectRatio="none"/>{_labels(row_names, column_names, f"{names[0]} ↓  {names[1]} →", box)}'
    if wide >= _TEXT_FROM:
        drawn += _cell_texts(grid, (low, high), center is not None, box)
    for r, c in np.argwhere(marked) if marked is not None else ():
        drawn += f'<circle cx="{left + (c + 1) * wide - 4:g}" cy="{8 + r * box[3]:g}" r="2"/>'
    more = {name: _flat(np.asarray(each, float)) for name, each in (also or {}).items()}
    data: dict[str, Any] = {
        "title": title,
        "rows": row_names,
        "columns": column_names,
        "names": names,
        "unit": unit,
        "box": box,
    }
    said = [f"{'≤ ' * bool(np.any(grid < low))}{low:.3g}", f"{'≥ ' * bool(np.any(grid > high))}{high:.3g}"]
    label = f"{title}: {names[0]} by {names[1]}, {said[0]} to {said[1]}{unit}; arrow keys read it"
    size = f"{right + 4 * len(column_names[-1]) if column_names else right:g}", f"{bottom + 34:g}"
    ramp = _picture(np.arange(255, dtype=np.uint8)[None], center is not None)
    return figure(
        "heat",
        title,
        f'<svg role="img" tabindex="0" aria-label="{escape(label)}" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}">{drawn}</svg>'
        f'<div class="key">{escape(said[0])}<img alt="" src="{ramp}">{escape(said[1] + unit)}</div>'
        + embed({**data, "values": {"": _flat(grid), **more}}),
    )


def stacked(title: str, rows: Mapping[str, Mapping[str, float]], *, unit: str = "") -> str:
    """A bar for each row, divided in its parts, whose shares are said in words too."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    html = ""
    for name, row in rows.items():
        total = math.fsum(row.values()) or 1.0
        pieces = ""
        for part, value in row.items():
            said = escape(f"{part}: {number(value)}{unit} ({value / total:.1%})")
            look = f'style="flex-grow:{value:.4g}" class="c{parts.index(part) % 8}"'
            pieces += f'<i {look} tabindex="0" data-tip="{said}">{escape(part)}</i>'
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
    header = struct.pack(">IIBBBBB", levels.shape[1] * _SHARP, levels.shape[0] * _SHARP, 8, 3, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in levels.repeat(_SHARP, 0).repeat(_SHARP, 1))
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


def _cell_texts(grid: np.ndarray, limits: tuple[float, float], diverging: bool, box: Box) -> str:
    """Each value in its cell, all with as many decimals as make three digits of the largest."""
    left, top, width, height = box
    low, high = limits
    decimals = max(0, 2 - math.floor(math.log10(max(float(np.nanmax(np.abs(grid), initial=0)), 0.01))))
    html = ""
    for (r, c), value in np.ndenumerate(grid):
        place = f'x="{left + (c + 0.5) * width:g}" y="{top + (r + 0.5) * height + 4:g}"'
        ground = "" if diverging else f' class="on-{"dark" if value - low < 0.55 * (high - low) else "light"}"'
        html += f"<text {place}{ground}>{'' if np.isnan(value) else f'{value:.{decimals}f}'.replace('-', '−')}</text>"
    return f'<g class="cells">{html}</g>'


def _labels(rows: Sequence[str], columns: Sequence[str], name: str, box: Box) -> str:
    """As many of the names as have room."""
    left, top, width, height = box
    bottom = top + height * len(rows)
    html = ""
    for r in range(0, len(rows), math.ceil(14 / height)):
        html += f'<text x="{left - 5}" y="{top + (r + 0.5) * height + 4:g}" text-anchor="end">{escape(rows[r])}</text>'
    for c in range(0, len(columns), math.ceil((7 * max(map(len, columns), default=0) + 6) / width)):
        html += (
            f'<text x="{left + (c + 0.5) * width:g}" y="{bottom + 14}" text-anchor="middle">{escape(columns[c])}</text>'
        )
    middle = left + width * len(columns) / 2
    return f'{html}<text x="{middle:g}" y="{bottom + 30}" text-anchor="middle">{escape(name)}</text>'
