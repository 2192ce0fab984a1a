"""The training step beside transformers, in turn and in one run."""

import statistics

from tests.bench.measure import in_turn
from tests.bench.shapes import SHAPES

OURS, CAPACITY = "mixtral-jax", "mixtral-jax, capacity 1.25"
EXPERTS = ("grouped_mm", "eager")


def section(shapes: list[str], rounds: int, steps: int) -> str:
    """A table for each shape."""
    return "\n".join(_table(shape, rounds, steps) for shape in shapes)


def _table(shape: str, rounds: int, steps: int) -> str:
    s = SHAPES[shape]
    commands = {
        OURS: ["tests.bench.ours", shape, str(steps)],
        CAPACITY: ["tests.bench.ours", shape, str(steps), "1.25"],
    }
    commands |= {f"transformers, {name}": ["tests.bench.theirs", shape, str(steps), name] for name in EXPERTS}
    results = in_turn(commands, rounds)
    speeds = {name: statistics.median(s.tokens / run["seconds"] for run in runs) for name, runs in results.items()}
    best = max((name for name in commands if name.startswith("transformers")), key=speeds.__getitem__)
    ours = results[OURS]
    useful = statistics.median(run["flops"] / run["seconds"] for run in ours)
    matmul = statistics.median(run["matmul_flops_per_second"] for run in ours)
    rows = [
        f"### Shape {shape}: hidden {s.hidden}, ffn {s.ffn}, {s.layers} layers, {s.heads}/{s.kv_heads} heads, "
        f"{s.experts} experts top-{s.top_k}, vocabulary {s.vocab}, sequence {s.seq_len}, batch {s.batch}\n",
        "| full training step, fp32 | tokens/s | against the best of transformers | peak memory, GB |",
        "|---|--:|--:|--:|",
    ]
    for name, runs in results.items():
        memory = statistics.median(run["peak_bytes"] for run in runs) / 1e9
        rows.append(f"| {name} | {speeds[name]:,.0f} | {speeds[name] / speeds[best]:.2f}x | {memory:.2f} |")
    rows.append(
        f"\nDropless takes {100 * (speeds[CAPACITY] / speeds[OURS] - 1):+.0f} % more time than capacity 1.25. Useful "
        f"FLOPs: {useful / 1e9:.0f} GFLOP/s, {100 * useful / matmul:.0f} % of XLA's own fp32 matmul "
        f"({matmul / 1e9:.0f} GFLOP/s) in the same processes. Compile: "
        f"{statistics.median(run['compile_seconds'] for run in ours):.1f} s.\n"
    )
    return "\n".join(rows)
