"""`make rehearse`: a run of several local processes under the supervisor, killed again and again, and the same curve.

python -m tests.rehearse [--processes 4] [--kills 10] [--every 20]

When all kills have come, each after so many seconds of training, each of another process, the supervisor is told to
stop: the run saves and ends with 75. Then it goes on for 20 steps with half the processes, and for 20 with all of them.
Beside it one that nobody disturbs: the losses of the killed one must be its losses, to the last bit, and behind the
kills within 1e-5.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

OVERRIDES = (
    "eval.every=null", "data.validation=[]", "checkpoint.every=2", "checkpoint.keep_last=2", "log.every=1",
    "log.tensorboard=false", "optimizer.warmup_steps=2", "optimizer.schedule=constant",
    "optimizer.learning_rate=3e-4",  # at the quickstart's a rounding in the last bit grows tenfold in a few steps
)  # fmt: skip


def supervised(run: str, folder: Path, steps: int, processes: int, kills: int = 0, every: float = 0) -> int:
    """Bring a run to that step under the supervisor, or as far as it is when all kills have come; its exit code."""
    killing = ("--kill-every", f"{every:g}s", "--kills", str(kills)) if kills else ()
    command = [
        sys.executable, "launch.py", "submit", "local", "configs/pretrain/quickstart.yaml", "--go",
        "--processes", str(processes), *killing, *OVERRIDES, f"steps={steps}", f"run_name={run}",
        f"output_dir={folder}", f"data.cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    print("$", *command[1:], flush=True)
    over = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            kills -= line.startswith("kill ")
            over |= not kills and line.startswith("attempt ")
            if over and killing and line.startswith("step "):
                process.terminate()  # once: the supervisor's second signal is a Ctrl-C
                killing = ()
    return process.returncode


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
    args = parser.parse_args()
    n = args.processes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = [supervised("killed", folder, 100_000, n, args.kills, args.every)]
        steps = max(losses(folder / "killed"))
        codes.append(supervised("killed", folder, steps + 20, max(1, n // 2)))
        codes += [supervised(run, folder, steps + 40, n) for run in ("killed", "undisturbed")]
        whole, killed = losses(folder / "undisturbed"), losses(folder / "killed")
    if codes != [75, 0, 0, 0] or not list(whole) == list(killed) == list(range(1, steps + 41)):
        sys.exit(f"exit codes {codes}, {len(killed)} and {len(whole)} steps")
    good = True
    for what, first, last, most in (
        (f"{n} processes, {args.kills} kills", 1, steps, 0.0),
        (f"{max(1, n // 2)} processes", steps + 1, steps + 20, 1e-5),
        (f"{n} processes again", steps + 21, steps + 40, 1e-5),
    ):
        apart = max(abs(whole[s] - killed[s]) for s in range(first, last + 1))
        print(f"steps {first} to {last} on {what}: the losses differ by {apart:.1g}")
        good &= apart <= most
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
