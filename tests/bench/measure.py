"""Run measurements in processes of their own, in turn."""

import json
import os
import subprocess
import sys

OURS = ("tests.bench.ours", "tests.bench.tuning_ours")


def in_turn(commands: dict[str, list[str]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each command printed, one result a round; A B C A B C, so that a slow minute hits all of them."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            print(f"round {number + 1} of {rounds}: {name} ({' '.join(command)})", file=sys.stderr, flush=True)
            results[name].append(once(command))
    return results


def once(command: list[str]) -> dict[str, float]:
    """The JSON on the last line that `python -m command` prints."""
    if command[0] in OURS:
        command = ["tests.bench.kept", *command]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
