"""The training step beside the others, in turn and in one run."""

import statistics
from typing import Any

from tests.bench.rounds import MAXTEXT, MAXTEXT_VENV, Results, beside, faster
from tests.bench.shapes import SHAPES, Shape

OURS, OURS_BF16, CAPACITY = "mixtral-jax", "mixtral-jax, bf16", "mixtral-jax, capacity 1.25"
EXPERTS = ("grouped_mm", "eager")
TUNED = "transformers, grouped_mm, tuned"  # theirs_tuned.py says how
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

    def command(who: str, *options: str) -> list[str]:
        return [f"tests.bench.{who}", shape, *options]

    others = {CAPACITY: command("ours", "capacity=1.25")}
    others |= {f"transformers, {name}": command("theirs", f"experts={name}") for name in EXPERTS}
    others[TUNED] = command("theirs_tuned", "experts=grouped_mm")
    with_maxtext = shape in MAXTEXT_SHAPES and (MAXTEXT_VENV / "stamp").exists()
    if with_maxtext:
        others |= {f"MaxText, {mode}": [MAXTEXT, shape, mode] for mode in ("capacity", "dropless")}
    bf16 = "dtype=bfloat16"
    halves = {"transformers, grouped_mm, bf16": command("theirs", "experts=grouped_mm", bf16)}
    halves[f"{TUNED}, bf16"] = command("theirs_tuned", "experts=grouped_mm", bf16)
    halves["transformers, grouped_mm, fp32"] = command("theirs", "experts=grouped_mm")
    halves["mixtral-jax, fp32"] = command("ours")
    tables = [
        f"### Shape {shape}: hidden {s.hidden}, ffn {s.ffn}, {s.layers} layers, {s.heads}/{s.kv_heads} heads, "
        f"{s.experts} experts top-{s.top_k}, vocabulary {s.vocab}, sequence {s.seq_len}, batch {s.batch}\n"
    ]
    results = beside(OURS, command("ours"), others, steps)
    dropless = 100 * (1 / statistics.median(results[CAPACITY]["ratios"]) - 1)
    tables += [*_rows("fp32", s, results), f"\nDropless takes {dropless:+.0f} % more time than capacity 1.25. "]
    tables[-1] += _rate("fp32", results[OURS])
    if with_maxtext:
        tables.append(MAXTEXT_NOTE.format(versions=results["MaxText, dropless"]["versions"]))
    results = beside(OURS_BF16, command("ours", bf16), halves, steps)
    tables += [*_rows("bf16", s, results), "\n" + _rate("bf16", results[OURS_BF16])]
    return "\n".join(tables)


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
