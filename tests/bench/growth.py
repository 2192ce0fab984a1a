"""Cost as work grows: experts, sequence, batch and depth, as a table and a picture; many steps; a long sequence."""

import statistics
from pathlib import Path
from typing import Any

from tests.bench.rounds import beside, in_turn
from tests.bench.shapes import parse

OURS = "tests.bench.ours"
PICTURE = Path("docs/growth.png")
HEAD = """Shape S with one number changed, each beside S.

| | tokens/s, in those of S | compile, s | peak memory, GB |
|---|--:|--:|--:|"""
AXES = {
    "experts": (4, 8, 16, 32),
    "seq_len": (128, 256, 512, 1024),
    "batch": (2, 4, 8, 16),
    "layers": (2, 4, 8, 16),
}


def section(steps: int) -> str:
    """One table; one line of the picture for each axis, relative to shape S."""
    base = parse("S")
    changed = {f"S:{axis}={value}": (axis, value) for axis, values in AXES.items() for value in values}
    runs = beside("S", [OURS, "S"], {text: [OURS, text] for text in changed if parse(text) != base}, steps)
    rows: list[str] = []
    lines: dict[str, list[tuple[int, float]]] = {axis: [] for axis in AXES}
    for text, (axis, value) in changed.items():
        run = runs.get(text, runs["S"])
        speeds = sorted(parse(text).tokens / base.tokens / ratio for ratio in run["ratios"])
        speed = statistics.median(speeds)
        lines[axis].append((value, speed))
        rows.append(
            f"| {axis} {value} | {speed:.2f} ({speeds[0]:.2f} to {speeds[-1]:.2f}) | {run['compile_seconds']:.1f} "
            f"| {run['peak_bytes'] / 1e9:.2f} |"
        )
    draw(lines)
    at_s = f"S: {base.tokens / runs['S']['seconds']:,.0f} tokens/s."
    return "\n".join([HEAD, *rows, f"\n{at_s}\n\n![tokens per second as work grows]({PICTURE.name})"])


def _alone(shape: str, steps: int) -> dict[str, Any]:
    return in_turn({"mixtral-jax": [OURS, shape]}, steps)["mixtral-jax"]


def draw(lines: dict[str, list[tuple[int, float]]]) -> None:
    """Tokens per second against each axis, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        base = parse("S")._asdict()[name]
        axes.plot([x / base for x, _ in points], [y for _, y in points], marker="o", label=f"{name} (S: {base})")
    axes.set(xscale="log", yscale="log", xlabel="times shape S", ylabel="tokens per second, of shape S's")
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    axes.set_yticks([0.5, 1, 2], ["1/2", "1", "2"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PICTURE, dpi=110)


def many_steps(steps: int) -> str:
    """Whether memory or time grows over a run of small steps."""
    run = _alone("XS", steps)
    first, last = (statistics.median(part) for part in (run["times"][: steps // 4], run["times"][-(steps // 4) :]))
    return (
        f"{steps:,} steps at shape XS: resident memory grew by {run['grown_bytes'] / 1e6:.1f} MB after the twentieth; "
        f"the last quarter of the steps took {last / first:.2f} times as long as the first."
    )


def long_sequence() -> str:
    """One row of 32,768 tokens, two layers of shape S."""
    rows = ["| shape S, 2 layers, batch 1 | seconds a step | peak memory, GB |", "|---|--:|--:|"]
    for length in (8192, 16384, 32768):
        run = _alone(f"S:layers=2,batch=1,seq_len={length}", 1)
        rows.append(f"| sequence {length:,} | {run['seconds']:.1f} | {run['peak_bytes'] / 1e9:.2f} |")
    return "\n".join(rows)
