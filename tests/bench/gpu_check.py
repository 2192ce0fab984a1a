"""`make gpu-check`: what only a GPU can show, in one run of under eight minutes; one markdown table for each part.

python -m tests.bench.gpu_check [--toy] [--only kernels curve step tuning generation] [--out FILE] [--minutes 8]

With --toy all of it runs on the CPU at toy size, so that on the day on which a GPU is there nothing but that is new.
Exit code 1: a kernel is wrong, or the curve is another one than the CPU's.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

TITLES = {
    "kernels": "Kernels beside their oracles",
    "curve": "The quickstart's first steps beside the CPU's",
    "step": "The step of a Mixtral of 1.5 billion parameters",
    "tuning": "Fine-tuning beside TRL",
    "generation": "Generation beside transformers",
}
NEEDED = {"tuning": ("trl", "peft", "datasets"), "curve": ("grain", "array_record"), "generation": ("transformers",)}
APART = {"float32": 2e-3, "bfloat16": 2e-2}  # of the loss after the first steps, where rounding has not yet grown


class Size(NamedTuple):
    """How large everything is."""

    kernel_rows: int
    curve_steps: int
    shape: str
    tuning_shape: str
    dtype: str
    steps: int
    new_tokens: int
    batches: tuple[int, ...]


FULL = Size(256, 50, "G", "G:layers=8,seq_len=1024,batch=8", "bfloat16", 8, 128, (1, 8))
TOY = Size(32, 5, "XS", "XS", "float32", 2, 8, (2,))


class TooLong(Exception):
    """The time of a part is over."""


def kernels(size: Size) -> tuple[str, bool]:
    """Relative errors of values and gradients."""
    command = [sys.executable, "-m", "tests.bench.gpu_kernels", str(size.kernel_rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=_environment())
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = ["| kernel | dtype | value | gradients | |", "|---|---|--:|--:|---|"]
    good = done.returncode == 0
    for line in lines:
        value, *gradients = line.get("errors", (math.inf, math.inf))
        right = max(value, *gradients) <= line["farthest"]
        verdict = "right" if right else line.get("absent", "**wrong**")
        good &= right or ("absent" in line and not line["chosen"])  # never wrong, and what `auto` takes is there
        rows.append(f"| {line['kernel']} | {line['dtype']} | {value:.1e} | {max(gradients):.1e} | {verdict} |")
    return "\n".join(rows), good


def curve(size: Size) -> tuple[str, bool]:
    """Losses of one recipe on both, in fp32 and in bf16."""
    rows = ["| | last loss, CPU | last loss here | largest difference of a step | |", "|---|--:|--:|--:|---|"]
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for dtype in APART:
            runs = [_losses(size.curve_steps, dtype, where, folder) for where in ("cpu", _where())]
            apart = max(abs(a - b) / a for a, b in zip(*runs, strict=True))
            good &= apart <= APART[dtype] * max(1, size.curve_steps / 10)
            verdict = "as the CPU's" if good else "**another curve**"
            rows.append(f"| {dtype} | {runs[0][-1]:.4f} | {runs[1][-1]:.4f} | {100 * apart:.2f} % | {verdict} |")
    return "\n".join(rows), good


def _losses(steps: int, dtype: str, where: str, folder: str) -> list[float]:
    name = f"{dtype}-{where}"
    changes = {
        "steps": steps, "output_dir": folder, "run_name": name, "compute.dtype": dtype, "log.every": 1,
        "eval.every": "null", "data.validation": "[]", "checkpoint.every": steps, "log.tensorboard": "false",
        "data.cache_dir": f"{folder}/cache", "optimizer.warmup_steps": 2,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in changes.items()]
    command = [sys.executable, "launch.py", "pretrain", "configs/pretrain/quickstart.yaml", *words]
    environment = {**_environment(), "JAX_PLATFORMS": where}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    lines = map(json.loads, (Path(folder) / name / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def step(size: Size) -> tuple[str, bool]:
    """Ours by back-ends, and transformers, two at a time; what the compiler planned beside what was in use."""
    from tests.bench.rounds import beside, faster
    from tests.bench.shapes import parse

    shape, how = parse(size.shape), f"dtype={size.dtype}"
    ours = ["tests.bench.ours", size.shape, how]
    others = {f"mixtral-jax, {words}": [*ours, *words.split()] for words in _back_ends(size)}
    others |= {
        f"transformers, grouped_mm, {attention}": ["tests.bench.theirs", size.shape, how, "experts=grouped_mm",
                                                    f"attention={attention}"]
        for attention in ("sdpa", *["flash_attention_2"] * (util.find_spec("flash_attn") is not None))
    }  # fmt: skip
    results = _surviving(lambda rest: beside("mixtral-jax", ours, rest, size.steps), others)
    rows = [
        f"{shape}, {size.dtype}, dropless. Ours has fp32 weights and moments, transformers' are of this dtype too.\n",
        "| training step | seconds | tokens/s | ours is faster by | MFU | peak memory, GB | planned, GB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    first: dict[str, Any] = next(iter(results.values()), {})
    for name, run in results.items():
        if "failed" in run:
            rows.append(f"| {name} | {run['failed']} | | | | | |")
            continue
        peak = first.get("peak_flops") or math.nan
        planned = run.get("planned_bytes", math.nan) / 1e9
        rows.append(
            f"| {name} | {run['seconds']:.3f} | {shape.tokens / run['seconds']:,.0f} | {faster(run)} | "
            f"{100 * first['flops'] / run['seconds'] / peak:.1f} % | {run['peak_bytes'] / 1e9:.2f} | {planned:.2f} |"
        )
    return "\n".join(rows).replace("nan %", "").replace(" nan ", " "), True


def _back_ends(size: Size) -> tuple[str, ...]:
    if size is TOY:
        return ("attention=reference", "experts=ragged_dot")
    return ("attention=triton", "attention=dot_product", "experts=ragged_dot")


def tuning(size: Size) -> tuple[str, bool]:
    """LoRA SFT and DPO."""
    return _pairs(size, {
        kind: ([f"tests.bench.tuning_{who}", size.tuning_shape, kind, "0.5", f"dtype={size.dtype}"] for who in SIDES)
        for kind in ("lora", "dpo")
    }, "TRL")  # fmt: skip


def generation(size: Size) -> tuple[str, bool]:
    """Cached greedy decoding."""
    new, how = str(size.new_tokens), f"dtype={size.dtype}"
    return _pairs(size, {
        f"batch {batch}": (["tests.bench.generation", size.shape, new, str(batch), who, how] for who in SIDES)
        for batch in size.batches
    }, "transformers")  # fmt: skip


SIDES = ("ours", "theirs")


def _pairs(size: Size, commands: dict[str, Iterator[list[str]]], other: str) -> tuple[str, bool]:
    from tests.bench.rounds import beside, faster

    rows = ["| | ours, seconds | theirs, seconds | ours is faster by |", "|---|--:|--:|--:|"]
    for name, (ours, theirs) in commands.items():
        results = _surviving(lambda rest, ours=ours: beside("ours", ours, rest, size.steps), {other: theirs})
        run = results[other]
        if "failed" in run:
            rows.append(f"| {name} | {run['failed']} | | |")
        else:
            rows.append(f"| {name} | {results['ours']['seconds']:.3f} | {run['seconds']:.3f} | {faster(run)} |")
    return "\n".join([f"Beside {other}, {size.dtype}.\n", *rows]), True


def _surviving(measure: Callable[[dict[str, list[str]]], dict[str, Any]], others: dict[str, Any]) -> dict[str, Any]:
    """All results; one that cannot run says so in its own line and takes none with it."""
    ours: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for name, command in others.items():
        try:
            found = measure({name: command})
        except RuntimeError as error:
            found = {name: {"failed": f"did not run: {error}"}}
        results[name] = found.pop(name)
        ours = found or ours
    return ours | results


def _where() -> str:
    return os.environ["BENCH_PLATFORM"]


def _environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": _where(), "HF_HUB_OFFLINE": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends what it stands around."""

    def over(*_: object) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


PARTS: dict[str, Callable[[Size], tuple[str, bool]]] = {
    "kernels": kernels, "curve": curve, "step": step, "tuning": tuning, "generation": generation,
}  # fmt: skip


def measured(name: str, size: Size, seconds: float) -> tuple[str, bool]:
    """The table of a part, or why there is none."""
    absent = [package for package in NEEDED.get(name, ()) if util.find_spec(package) is None]
    if absent:
        return f"Left out: {', '.join(absent)} is not installed.", True
    began = time.monotonic()
    try:
        with at_most(seconds):
            text, good = PARTS[name](size)
    except TooLong:
        return f"Left out: not done after {seconds:.0f} s.", True
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"Failed: {error}", False
    return f"{text}\n\n{time.monotonic() - began:.0f} s.", good


def heading() -> str:
    """Which machine and which versions."""
    names = ("jax", "jaxlib", "flax", "tokamax", "torch", "transformers", "trl")
    versions = [f"{name} {metadata.version(name)}" for name in names if util.find_spec(name) is not None]
    ask = "import jax; print(jax.devices()[0].device_kind)"
    device = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, env=_environment())
    return (
        f"# GPU check\n\n{device.stdout.strip() or 'no device'}, {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {', '.join(versions)}. `python -m tests.bench.gpu_check "
        f"{' '.join(sys.argv[1:])}`"
    )


def main() -> int:
    """Part by part; the file is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="on the CPU, at toy size")
    parser.add_argument("--only", nargs="+", choices=tuple(TITLES), default=list(TITLES), help="parts to run")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.md"), help="where the tables go")
    parser.add_argument("--minutes", type=float, default=8, help="of all parts together")
    args = parser.parse_args()
    os.environ["BENCH_PLATFORM"] = "cpu" if args.toy else "cuda"
    size, ends, good = TOY if args.toy else FULL, time.monotonic() + 60 * args.minutes, True
    text = heading()
    for name in (part for part in TITLES if part in args.only):
        table, right = measured(name, size, ends - time.monotonic())
        good &= right
        part = f"\n\n## {TITLES[name]}\n\n{table}"
        print(part, flush=True)
        text += part
        args.out.write_text(text + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
