"""The training step beside the others, in turn and in one run."""

import statistics

from tests.bench.rounds import MAXTEXT, MAXTEXT_VENV, beside, faster
from tests.bench.shapes import SHAPES

OURS, CAPACITY = "mixtral-jax", "mixtral-jax, capacity 1.25"
EXPERTS = ("grouped_mm", "eager")
MAXTEXT_SHAPES = ("XS", "S")  # for which its options were chosen
MAXTEXT_NOTE = """
MaxText ({versions}) is written for TPU and GPU: on a CPU its dropless experts run as `ragged_dot` (its
Pallas kernels only interpreted), with the options that were fastest here; capacity 1.25 counts in each sequence.
"""


def section(shapes: list[str], steps: int) -> str:
    """A table for each shape."""
    return "\n".join(_table(shape, steps) for shape in shapes)


def _table(shape: str, steps: int) -> str:
    s = SHAPES[shape]
    others = {CAPACITY: ["tests.bench.ours", shape, "capacity=1.25"]}
    others |= {f"transformers, {name}": ["tests.bench.theirs", shape, f"experts={name}"] for name in EXPERTS}
    with_maxtext = shape in MAXTEXT_SHAPES and (MAXTEXT_VENV / "stamp").exists()
    if with_maxtext:
        others |= {f"MaxText, {mode}": [MAXTEXT, shape, mode] for mode in ("capacity", "dropless")}
    results = beside(OURS, ["tests.bench.ours", shape], others, steps)
    ours, useful = results[OURS], results[OURS]["flops"] / results[OURS]["seconds"]
    more = 100 * (1 / statistics.median(results[CAPACITY]["ratios"]) - 1)
    rows = [
        f"### Shape {shape}: hidden {s.hidden}, ffn {s.ffn}, {s.layers} layers, {s.heads}/{s.kv_heads} heads, "
        f"{s.experts} experts top-{s.top_k}, vocabulary {s.vocab}, sequence {s.seq_len}, batch {s.batch}\n",
        "| full training step, fp32 | seconds | tokens/s | ours is faster by | peak memory, GB |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, run in results.items():
        rows.append(
            f"| {name} | {run['seconds']:.2f} | {s.tokens / run['seconds']:,.0f} | {faster(run)} | "
            f"{run['peak_bytes'] / 1e9:.2f} |"
        )
    rows.append(
        f"\nDropless takes {more:+.0f} % more time than capacity 1.25. Useful "
        f"FLOPs: {useful / 1e9:.0f} GFLOP/s, {100 * useful / ours['matmul_flops_per_second']:.0f} % of XLA's own fp32 "
        f"matmul ({ours['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s) in the same processes. Compile: "
        f"{ours['compile_seconds']:.1f} s.\n"
    )
    if with_maxtext:
        rows.append(MAXTEXT_NOTE.format(versions=results["MaxText, dropless"]["versions"]))
    return "\n".join(rows)
