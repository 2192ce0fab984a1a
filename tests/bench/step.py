"""The training step beside the others, in turn and in one run."""

import statistics
from collections.abc import Sequence
from typing import Any

from tests.bench.rounds import MAXTEXT, MAXTEXT_VENV, Results, beside, faster
from tests.bench.shapes import SHAPES, Shape
from tests.bench.theirs_tuned import can_be_tuned

DTYPES = ("float32", "bfloat16")
OURS, OURS_BF16, CAPACITY = "mixtral-jax", "mixtral-jax, bf16", "mixtral-jax, capacity 1.25"
EXPERTS = ("grouped_mm", "eager")
TUNED = "transformers, grouped_mm, tuned"  # theirs_tuned.py says how
MAXTEXT_SHAPES = ("XS", "S")  # for which its options were chosen
MAXTEXT_NOTE = """
MaxText ({versions}) is written for TPU and GPU: on a CPU its dropless experts run as `ragged_dot` (its
Pallas kernels only interpreted), with the options that were fastest here; capacity 1.25 counts in each sequence.
"""


def section(shapes: list[str], dtypes: Sequence[str], steps: int) -> str:
    """For each shape a table of each dtype."""
    made = {"float32": _fp32, "bfloat16": _bf16}
    return "\n".join("\n".join([_title(shape), *(made[dtype](shape, steps) for dtype in dtypes)]) for shape in shapes)


def _title(shape: str) -> str:
    s = SHAPES[shape]
    return (
        f"### Shape {shape}: hidden {s.hidden}, ffn {s.ffn}, {s.layers} layers, {s.heads}/{s.kv_heads} heads, "
        f"{s.experts} experts top-{s.top_k}, vocabulary {s.vocab}, sequence {s.seq_len}, batch {s.batch}\n"
    )


def _fp32(shape: str, steps: int) -> str:
    def command(who: str, *options: str) -> list[str]:
        return [f"tests.bench.{who}", shape, *options]

    others = {CAPACITY: command("ours", "capacity=1.25")}
    others |= {f"transformers, {name}": command("theirs", f"experts={name}") for name in EXPERTS}
    if can_be_tuned():
        others[TUNED] = command("theirs_tuned", "experts=grouped_mm")
    with_maxtext = shape in MAXTEXT_SHAPES and (MAXTEXT_VENV / "stamp").exists()
    if with_maxtext:
        others |= {f"MaxText, {mode}": [MAXTEXT, shape, mode] for mode in ("capacity", "dropless")}
    results = beside(OURS, command("ours"), others, steps)
    dropless = 100 * (1 / statistics.median(results[CAPACITY]["ratios"]) - 1)
    lines = _rows("fp32", SHAPES[shape], results)
    lines.append(f"\nDropless takes {dropless:+.0f} % more time than capacity 1.25. {_rate('fp32', results[OURS])}")
    if with_maxtext:
        lines.append(MAXTEXT_NOTE.format(versions=results["MaxText, dropless"]["versions"]))
    return "\n".join(lines)


def _bf16(shape: str, steps: int) -> str:
    """Beside theirs in bf16, and beside fp32 on both sides."""
    ours, options, bf16 = ["tests.bench.ours", shape], [shape, "experts=grouped_mm"], "dtype=bfloat16"
    theirs = ["tests.bench.theirs", *options]
    others = {
        "transformers, grouped_mm, bf16": [*theirs, bf16],
        "transformers, grouped_mm, autocast": [*theirs, "autocast=true"],
        "transformers, eager, autocast": ["tests.bench.theirs", shape, "experts=eager", "autocast=true"],
        "transformers, grouped_mm, fp32": theirs,
        "mixtral-jax, fp32": ours,
    }
    if can_be_tuned():
        others[f"{TUNED}, fp32"] = ["tests.bench.theirs_tuned", *options]
        others[f"{TUNED}, bf16"] = ["tests.bench.theirs_tuned", *options, bf16]
    results = beside(OURS_BF16, [*ours, bf16], others, steps)
    return "\n".join([*_rows("bf16", SHAPES[shape], results), "\n" + _rate("bf16", results[OURS_BF16])])


def _rows(precision: str, s: Shape, results: Results) -> list[str]:
    rows = [
        f"| full training step, {precision} | seconds | tokens/s | ours is faster by | peak memory, GB |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, run in results.items():
        rows.append(
            f"| {name} | {run['seconds']:.2f} | {s.tokens / run['seconds']:,.0f} | {faster(run)} | "
            f"{run['peak_bytes'] / 1e9:.2f} |"
        )
    return rows


def _rate(precision: str, ours: dict[str, Any]) -> str:
    useful, rate = ours["flops"] / ours["seconds"], ours["matmul_flops_per_second"]
    return (
        f"Useful FLOPs: {useful / 1e9:.0f} GFLOP/s, {100 * useful / rate:.0f} % of XLA's own {precision} matmul "
        f"({rate / 1e9:.0f} GFLOP/s) in the same processes. Compile: {ours['compile_seconds']:.1f} s.\n"
    )
