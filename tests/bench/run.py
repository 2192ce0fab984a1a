"""`make bench`: measure beside the others, in turn and in one run, and write docs/benchmarks.md.

python -m tests.bench.run [--form short|full] [--only step tuning generation growth long data] [--shapes S M L]
    [--dtypes float32 bfloat16] [--steps 8] [--tokenizer PATH]
"""

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tests.bench import feeding, growth, side, step
from tests.bench.shapes import SHAPES

DOC = Path("docs/benchmarks.md")
IN_TURN = (
    "What is compared lives at the same time, two processes that take one step each in turn: median, least and most."
)
TITLES = {
    "step": "The training step",
    "tuning": "Fine-tuning beside TRL",
    "generation": "Generation beside transformers",
    "growth": "As work grows",
    "long": "Many steps, and a long sequence",
    "data": "Preparing data, and waiting for it",
}


def sections(full: bool, args: argparse.Namespace) -> dict[str, Callable[[], str]]:
    """What each section runs: in full, or enough to see whether something broke."""
    shapes, steps = args.shapes, args.steps or (8 if full else 3)
    return {
        "step": lambda: step.section(shapes or (["S", "M", "L"] if full else ["S"]), args.dtypes, steps),
        "tuning": lambda: side.tuning(steps),
        "generation": lambda: side.generation(256 if full else 64, calls=steps),
        "growth": lambda: growth.section(steps=3),
        "long": lambda: growth.many_steps(2000 if full else 200) + "\n\n" + growth.long_sequence(),
        "data": lambda: feeding.section(args.tokenizer, copies=5 if full else 1, steps=200 if full else 40),
    }


def main() -> int:
    """Measure, print, and put each section into the document as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=("short", "full"), default="short", help="how much to run (default short)")
    parser.add_argument("--only", nargs="+", choices=tuple(TITLES), default=list(TITLES), help="sections to run")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), help="shapes of the section step")
    parser.add_argument("--dtypes", nargs="+", choices=step.DTYPES, default=step.DTYPES, help="of section step")
    parser.add_argument("--steps", type=int, help="steps (or calls) of each, in turn with those of the other")
    parser.add_argument("--tokenizer", help="of section data (default: the bundled one)")
    args = parser.parse_args()
    for name, run in sections(args.form == "full", args).items():
        if name in args.only:
            how = f" {IN_TURN}" if name in ("step", "tuning", "generation", "growth") else ""
            text = f"{heading()}{how} `python -m tests.bench.run {' '.join(sys.argv[1:])}`\n\n{run()}"
            print(text, flush=True)
            write_section(DOC, name, text)
    return 0


def heading() -> str:
    """When, where, and with what."""
    packages = ("jax", "flax", "torch", "transformers", "trl")
    names = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{names}."
    )


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between the section's two markers, or add it at the end."""
    begin, end = f"<!-- {name}: made by make bench -->", f"<!-- end of {name} -->"
    old = path.read_text() if path.exists() else "# Benchmarks\n"
    if begin not in old:
        old = f"{old.rstrip()}\n\n## {TITLES[name]}\n\n{begin}\n{end}\n"
    head, _, rest = old.partition(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    sys.exit(main())
