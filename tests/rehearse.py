"""`make rehearse`: a run of several local processes under the supervisor, killed again and again, and the same curve.

python -m tests.rehearse [--processes 4] [--kills 10] [--every 20] [--steps 60]

First the run that nobody disturbs; then the same with kills; its losses must be those of the first, to the last bit.
Then both go on for as many steps again, the killed one with half the processes and with all of them again: the same
rows, losses within 1e-5.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

OVERRIDES = (
    "eval.every=null", "data.validation=[]", "checkpoint.every=5", "checkpoint.keep_last=2", "log.every=1",
    "log.tensorboard=false", "optimizer.warmup_steps=2", "optimizer.schedule=constant",
)  # fmt: skip


def supervised(run: str, folder: Path, steps: int, processes: int, *words: str) -> dict[int, float]:
    """Losses by step of a run that the supervisor has brought to its end."""
    command = [
        sys.executable, "launch.py", "submit", "local", "configs/pretrain/quickstart.yaml", "--go",
        "--processes", str(processes), *words, *OVERRIDES, f"steps={steps}", f"run_name={run}", f"output_dir={folder}",
        f"data.cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    print("$", *command[1:], flush=True)
    subprocess.run(command, check=True)
    lines = map(json.loads, (folder / run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def farthest(a: dict[int, float], b: dict[int, float]) -> float:
    """The largest difference of a step; infinite where one lacks a step of the other."""
    return max(abs(a[s] - b[s]) for s in a) if a.keys() == b.keys() else math.inf


def main() -> int:
    """0: the curves are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=float, default=20, help="seconds of training between two kills")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    n, steps = args.processes, args.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = supervised("undisturbed", folder, steps, n)
        kills = ("--kill-every", f"{args.every:g}s", "--kills", str(args.kills))
        killed = supervised("killed", folder, steps, n, *kills)
        apart = farthest(whole, killed)
        print(f"{steps} steps on {n} processes, {args.kills} kills: the losses differ by {apart:g}")
        whole = supervised("undisturbed", folder, 3 * steps, n)
        for more, count in ((2, max(1, n // 2)), (3, n)):
            other = supervised("killed", folder, more * steps, count)
            print(f"to step {more * steps} on {count}: {farthest({s: whole[s] for s in other}, other):.1e}")
            apart = max(apart, farthest({s: whole[s] for s in other}, other) - 1e-5)
    return 0 if apart <= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
