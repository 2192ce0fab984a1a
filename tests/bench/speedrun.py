"""`make speedrun`: the quickstart's task as an open record, the fewest bits per byte for 180 seconds of two cores.

python -m tests.bench.speedrun [CONFIG] [a.b=c ...] [--dev] [--seeds 1] [--part 0.5] [--write "the change in one line"]

The present record is configs/pretrain/quickstart.yaml, whose `steps` were its 180 seconds. An entry is another file, or
changes of that one. Both are trained in turn, a step each, and the entry gets as many steps as the record's would have
taken; then it is trained with each seed and evaluated. `--dev`: on a twentieth of the training texts that is held back,
for choosing; without it on the validation texts, for a record. docs/speedrun.md has the rules and the table.
"""

import argparse
import datetime
import gzip
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from operator import attrgetter
from pathlib import Path

from mixtral_jax.data.config import DataConfig
from mixtral_jax.train.config import load_config
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.run.environment import git_commit
from tests.bench.rounds import in_turn
from tests.bench.worker import PLATFORM

RECORD = "configs/pretrain/quickstart.yaml"
DOC = Path("docs/speedrun.md")
BUDGET, HELD_BACK = 180, 20  # seconds; one of so many documents
OF_DATA = (f"data.{name}" for name in DataConfig.model_fields if name not in ("packing", "workers", "cache_dir"))
SAME = (*OF_DATA, "eval.batches", "init_from", "resume_from", "checkpoint.directory")
LEAST_ROW, LEAST_PAIRS = 64, 40
QUIET = ("log.tensorboard=false", "log.progress=false", "checkpoint.every=1000000")


def main() -> int:
    """Measure an entry, print its row of the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", nargs="*", help="a file, and what is changed of it (default: the record itself)")
    parser.add_argument("--dev", action="store_true", help="on texts held back of the training texts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", type=float, default=1.0, help="of the budget")
    parser.add_argument(
        "--pairs", type=int, default=LEAST_PAIRS, help="steps of each that are timed; 0: it costs as much"
    )
    parser.add_argument(
        "--anchor", action="store_true", help="by the clock, not by the record's steps: a quiet machine"
    )
    parser.add_argument("--write", metavar="CHANGE", help="the entry's row into docs/speedrun.md")
    args = parser.parse_args()
    if args.write and (args.dev or args.part != 1 or args.seeds < 3):
        parser.error("--write is for the whole budget, three seeds and the validation texts")
    if args.write and args.entry and (args.anchor or args.pairs < LEAST_PAIRS):
        parser.error(f"--write is for {LEAST_PAIRS} steps and more, timed in turn with the record's")
    if min(args.seeds, args.pairs + 1) < 1 or args.part <= 0 or (args.anchor and not args.pairs):
        parser.error("--seeds is 1 or more, --pairs 0 or more (with --anchor 1), --part above 0")
    try:
        config, changes = split(args.entry)
    except (UserError, ValueError, OSError) as error:
        parser.error(str(error))
    name, scores, code = ": ".join(filter(None, (args.write, " ".join(args.entry) or "the record"))), [], 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            launch(config, *changes, *_named(Path(folder) / "dry"), "--dry-run")  # refused before anything is timed
            steps = round(budget(Path(folder), config, changes, args.pairs, anchor=args.anchor) * args.part)
            data = held_back(Path(folder)) if args.dev else ()
            for seed in range(args.seeds):
                scores.append(trained(Path(folder) / f"{seed}", config, (*changes, *data), steps, seed))
        except (subprocess.CalledProcessError, RuntimeError) as error:  # of a run, of one that is timed
            code = max(1, getattr(error, "returncode", 1))
            said = error if isinstance(error, RuntimeError) else f"launch.py ended with {code}"
            print(f"speedrun: after {len(scores)} seeds: {said}", file=sys.stderr)
    if scores:
        line = row(name, steps, scores)
        print(line, flush=True)
    if args.write and not code:
        DOC.write_text(DOC.read_text(encoding="utf-8").rstrip("\n") + f"\n{line}\n", encoding="utf-8")
    return code


def split(words: list[str]) -> tuple[str, tuple[str, ...]]:
    """The file of an entry, and the changes.

    Raises:
        UserError: they are no configuration of a pretraining, or against the rules.
    """
    files, changes = [word for word in words if "=" not in word] or [RECORD], [word for word in words if "=" in word]
    if len(files) > 1:
        raise UserError(f"an entry is one file, not {' and '.join(files)}")
    entry, record = load_config(files[0], changes).config, load_config(RECORD).config
    if entry.stage != "pretrain":
        raise UserError(f"{files[0]} is of stage {entry.stage}: the race is pretraining")
    for key in SAME:
        theirs, own = (attrgetter(key)(config) for config in (record, entry))
        if theirs != own:
            raise UserError(f"{key} is the record's in every entry")
    if entry.seq_len < LEAST_ROW:
        raise UserError(f"seq_len is {entry.seq_len}: rows have {LEAST_ROW} tokens or more")
    return files[0], tuple(changes)


def budget(folder: Path, config: str, changes: tuple[str, ...], pairs: int, *, anchor: bool) -> int:
    """Steps of the entry that take as long as all of the record's."""
    module = "tests.bench.speedrun_step"
    entry = [module, str(folder / "entry"), config, *changes]
    if anchor:
        return round(BUDGET / in_turn({"entry": entry}, pairs)["entry"]["seconds"])
    steps = load_config(RECORD).config.steps
    assert steps
    if not pairs:
        return steps
    timed = in_turn({"record": [module, str(folder / "record"), RECORD], "entry": entry}, pairs)
    return round(steps * timed["record"]["seconds"] / timed["entry"]["seconds"])


def held_back(folder: Path) -> tuple[str, ...]:
    """The training texts without every twentieth document, and these as validation texts: as overrides."""
    data = load_config(RECORD).config.data
    lists: dict[str, list[dict[str, object]]] = {"train": [], "validation": []}
    for source in data.train:
        lines = gzip.decompress(Path(source.path).read_bytes()).splitlines(keepends=True)
        own = itertools.cycle([True] + [False] * (HELD_BACK - 1))
        parts = {"validation": [], "train": []}
        for line in lines:
            parts["validation" if next(own) else "train"].append(line)
        for part, texts in parts.items():
            file = folder / f"{source.name}.{part}.jsonl"
            file.write_bytes(b"".join(texts))
            weight = {"weight": source.weight} if part == "train" else {}
            lists[part].append({"name": source.name, "path": str(file), **weight})
    return tuple(f"data.{part}={json.dumps(sources)}" for part, sources in lists.items())


def trained(folder: Path, config: str, changes: tuple[str, ...], steps: int, seed: int) -> dict[str, float]:
    """Bits per byte by source, behind the last step."""
    last = (f"steps={steps}", f"eval.every={steps}", f"seed={seed}")
    launch(config, *changes, *QUIET, *last, *_named(folder))
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    found = {name: value for line in lines for name, value in line.items() if name.endswith("/bits_per_byte")}
    return {name.split("/")[1]: value for name, value in found.items() if name.count("/") == 2}


def _named(folder: Path) -> tuple[str, str]:
    return "run_name=run", f"output_dir={folder}"


def launch(*words: str) -> None:
    """`launch.py pretrain` where entries are timed: on a CPU, whatever else the machine has."""
    command = [sys.executable, "-P", "launch.py", "pretrain", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "JAX_PLATFORMS": PLATFORM})


def row(change: str, steps: int, scores: list[dict[str, float]]) -> str:
    """A line of the table: means over the seeds, and how far apart these are."""
    means = [statistics.mean(score.values()) for score in scores]
    each = [f"{statistics.mean(score[name] for score in scores):.3f}" for name in scores[0]]
    commit = git_commit() or ""
    commit = commit[:7] + "+" * commit.endswith("+")  # of a changed tree
    spread = f"{statistics.mean(means):.4f} ({min(means):.4f} to {max(means):.4f})"
    cells = (f"{datetime.date.today()}", change, spread, *each, f"{steps:,}", commit, processor())
    return "| " + " | ".join(cells) + " |"


def processor() -> str:
    """As Linux names it, else its architecture."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", file.read_text(encoding="utf-8")) if file.exists() else None
    return found[1].strip() if found else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
