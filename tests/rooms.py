"""Draws docs/rooms.svg from the imports of the source: `python -m tests.rooms`.

A box is a folder or a file beside folders; what it uses lies below it. A line is an import that no other path of
imports implies; imports between the three rooms are the arrows between the panels.
"""

from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

from tests.sources import ROOMS, ROOT, SOURCES, import_graph, module_name, room_of

PICTURE = ROOT / "docs" / "rooms.svg"
WIDTH, ROW, BOX, GAP, TOP = 1320, 54, 30, 10, 84
PANELS = {"train": (16, 500), "mixtral_jax": (532, 400), "data": (948, 356)}  # left edge and width


def unit(path: Path) -> str:
    """The box that a file belongs to: `train/hooks`, or `train/step.py` where it stands beside folders."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2])


def boxes() -> dict[str, set[str]]:
    """Box -> boxes of the same room that it imports."""
    units = {module_name(path): unit(path) for path in SOURCES if path.name != "__init__.py" and path.parent != ROOT}
    doors = {module_name(p): unit(p) for p in SOURCES if p.name == "__init__.py" and len(p.relative_to(ROOT).parts) > 2}
    names, graph = units | doors, defaultdict(set)
    for module, imported in import_graph().items():
        if module in names:
            graph[names[module]] |= {names[m] for m in imported if m in names and room_of(m) == room_of(module)}
    return {box: used - {box} for box, used in graph.items()}


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """0 uses nothing; everything else lies above what it uses."""
    level: dict[str, int] = {}
    for box in TopologicalSorter(graph).static_order():
        level[box] = 1 + max((level[used] for used in graph[box]), default=-1)
    return level


def direct(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Edges that no longer path implies."""
    reach: dict[str, set[str]] = {}
    for box in TopologicalSorter(graph).static_order():
        reach[box] = graph[box].union(*(reach[used] for used in graph[box]))
    return sorted((a, b) for a in graph for b in graph[a] if not any(b in reach[c] for c in graph[a] - {b}))


def draw() -> str:
    """The picture as SVG text."""
    graph, parts = boxes(), []
    level = levels(graph)
    height = TOP + ROW * (1 + max(level.values())) + 24
    places: dict[str, tuple[float, float, float]] = {}
    for room in ROOMS:
        left, width = PANELS[room]
        parts.append(f'<rect class="panel" x="{left}" y="44" width="{width}" height="{height - 60}" rx="10"/>')
        parts.append(f'<text class="room" x="{left + 14}" y="68">{room}/</text>')
        rows = defaultdict(list)
        for box in sorted(b for b in graph if b.split("/")[0] == room):
            rows[level[box]].append(box)
        for number, row in rows.items():
            each = min(150.0, (width - GAP * (len(row) + 1)) / len(row))
            start = left + (width - len(row) * each - (len(row) - 1) * GAP) / 2
            for i, box in enumerate(row):
                y = height - 24 - ROW * (number + 1)
                places[box] = (start + i * (each + GAP), y, each)
    for a, b in direct(graph):
        (xa, ya, wa), (xb, yb, wb) = places[a], places[b]
        parts.append(f'<path d="M{xa + wa / 2:.0f} {ya + BOX} L{xb + wb / 2:.0f} {yb}"/>')
    for box, (x, y, width) in places.items():
        kind = "file" if box.endswith(".py") else "folder"
        name = box.split("/")[1].removesuffix(".py") + ("" if kind == "file" else "/")
        parts.append(f'<rect class="{kind}" x="{x:.0f}" y="{y}" width="{width:.0f}" height="{BOX}" rx="5"/>')
        parts.append(f'<text x="{x + width / 2:.0f}" y="{y + 20}" text-anchor="middle">{name}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
        ' font-size="13">\n'
        "<style>.panel{fill:#f6f7f9;stroke:#c8ccd4}.folder{fill:#dbe7f6;stroke:#6b8fbf}.file{fill:#fff;stroke:#9aa3b2}"
        "path{stroke:#9aa3b2;fill:none}text{fill:#1c2330}.room{font-size:17px;font-weight:bold}"
        ".arrow{stroke:#1c2330;stroke-width:2}</style>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n'
        '<text class="room" x="16" y="28">launch.py → train/ → mixtral_jax/ and data/, which know nothing of each'
        " other</text>"
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
