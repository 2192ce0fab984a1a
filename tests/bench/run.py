"""`make bench`: the training step beside transformers, in turn and in one run; writes docs/benchmarks.md.

python -m tests.bench.run [--shapes S M L] [--rounds 3] [--steps 5]
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.bench.shapes import SHAPES

DOC = Path("docs/benchmarks.md")
BEGIN, END = "<!-- step: made by make bench -->", "<!-- end of step -->"
OURS, CAPACITY = "mixtral-jax", "mixtral-jax, capacity 1.25"
EXPERTS = ("grouped_mm", "batched_mm", "eager")


def main() -> int:
    """Run all variants in turn, print the table, and put it into the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["S"], choices=list(SHAPES), help="which steps to measure")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant runs, in turn with the others")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed in each run")
    parser.add_argument("--experts", nargs="+", default=list(EXPERTS), help="implementations of transformers")
    args = parser.parse_args()
    lines = [_heading(args)]
    for shape in args.shapes:
        lines += _table(shape, args.rounds, args.steps, args.experts)
    text = "\n".join(lines)
    print(text)
    write_section(DOC, text)
    return 0


def _heading(args: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch", "transformers"))
    command = "make bench" if len(sys.argv) == 1 else f"python -m tests.bench.run {' '.join(sys.argv[1:])}"
    return (
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{versions}. Each variant {args.rounds} times in turn, each in a process of its own, median of {args.steps} "
        f"steps after 2; the table has the median of the runs. Command: `{command}`.\n"
    )


def _table(shape: str, rounds: int, steps: int, experts: list[str]) -> list[str]:
    s = SHAPES[shape]
    commands = {
        OURS: ["tests.bench.ours", shape, str(steps)],
        CAPACITY: ["tests.bench.ours", shape, str(steps), "1.25"],
    }
    commands |= {f"transformers, {name}": ["tests.bench.theirs", shape, str(steps), name] for name in experts}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            print(f"shape {shape}, round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(_run(command))
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
        f"\nDropless takes {100 * (speeds[CAPACITY] / speeds[OURS] - 1):+.0f} % of the time of capacity 1.25. Useful "
        f"FLOPs: {useful / 1e9:.0f} GFLOP/s, {100 * useful / matmul:.0f} % of XLA's own fp32 matmul "
        f"({matmul / 1e9:.0f} GFLOP/s) in the same processes. Compile: "
        f"{statistics.median(run['compile_seconds'] for run in ours):.1f} s.\n"
    )
    return rows


def _run(command: list[str]) -> dict[str, float]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_section(path: Path, text: str) -> None:
    """Replace what stands between the two markers, or add it at the end."""
    old = path.read_text() if path.exists() else "# Benchmarks\n"
    if BEGIN not in old:
        old = f"{old.rstrip()}\n\n## The training step\n\n{BEGIN}\n{END}\n"
    head, _, rest = old.partition(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    sys.exit(main())
