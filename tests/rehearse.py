"""`make rehearse`: a run of several local processes under the supervisor, killed again and again, and the same curve.

python -m tests.rehearse [--processes 4] [--kills 10] [--every 20] [--steps 100]

The run is made longer by --steps until all kills have come, each after so many seconds of training, each of another
process; then it goes on for 20 steps with half the processes, and for 20 with all of them again. Beside it one that
nobody disturbs: the losses of the killed one must be its losses, to the last bit, and behind the kills within 1e-5.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

OVERRIDES = (
    "eval.every=null", "data.validation=[]", "checkpoint.every=5", "checkpoint.keep_last=2", "log.every=1",
    "log.tensorboard=false", "optimizer.warmup_steps=2", "optimizer.schedule=constant",
)  # fmt: skip


def supervised(run: str, folder: Path, steps: int, processes: int, *words: str) -> int:
    """Bring a run to that step under the supervisor; how many kills it took."""
    command = [
        sys.executable, "launch.py", "submit", "local", "configs/pretrain/quickstart.yaml", "--go",
        "--processes", str(processes), *words, *OVERRIDES, f"steps={steps}", f"run_name={run}", f"output_dir={folder}",
        f"data.cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    print("$", *command[1:], flush=True)
    kills = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            kills += line.startswith("kill ")
    if process.returncode:
        sys.exit(f"{run} ended with {process.returncode}")
    return kills


def losses(run: Path) -> dict[int, float]:
    """By step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def main() -> int:
    """0: the curves are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=float, default=20, help="seconds of training between two kills")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    n, kills, steps = args.processes, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while kills < args.kills:
            steps += args.steps
            words = ("--kill-every", f"{args.every:g}s", "--kills", str(args.kills - kills))
            kills += supervised("killed", folder, steps, n, *words)
        supervised("killed", folder, steps + 20, max(1, n // 2))
        supervised("killed", folder, steps + 40, n)
        supervised("undisturbed", folder, steps + 40, n)
        whole, killed = losses(folder / "undisturbed"), losses(folder / "killed")
    if whole.keys() != killed.keys() or len(whole) != steps + 40:
        sys.exit("a step is missing")
    good = True
    for what, first, last, most in (
        (f"{n} processes, {kills} kills", 1, steps, 0.0),
        (f"{max(1, n // 2)} processes", steps + 1, steps + 20, 1e-5),
        (f"{n} processes again", steps + 21, steps + 40, 1e-5),
    ):
        apart = max(abs(whole[s] - killed[s]) for s in range(first, last + 1))
        print(f"steps {first} to {last} on {what}: the losses differ by {apart:.1g}")
        good &= apart <= most
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
