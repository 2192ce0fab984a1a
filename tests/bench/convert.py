"""Speed and memory of the converter on a checkpoint of real width, against copying the same files.

    python tests/bench/convert.py DIRECTORY [--layers 3]

Writes a random bf16 Mixtral of 8x7B's width (hidden 4096, ffn 14336, 8 experts) with that many layers, 3 GB a layer,
then, each in a process of its own with the page cache dropped first: `cp` + fsync, hf2orbax, `cp` + fsync, orbax2hf.
Needs four times the checkpoint on disk. Prints a table; fails if a byte differs or memory exceeds its bound.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import Directory
from mixtral_jax.convert.hf import HfSource
from mixtral_jax.convert.safetensors import TensorSink
from mixtral_jax.convert.stream import copy
from mixtral_jax.convert.table import slots
from mixtral_jax.dtypes import BFLOAT16

CHILD = """
import json, sys, time
began = time.perf_counter()
from mixtral_jax.convert import hf2orbax, orbax2hf
imported = time.perf_counter()
globals()[sys.argv[1]](sys.argv[2], sys.argv[3], progress=True)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - imported, "import": imported - began, "peak": peak}))
"""


class Random:
    """A source of random finite bf16 values."""

    def __init__(self, config: MixtralConfig) -> None:
        self.config, self.slots = config, slots(config)

    def dtype(self, slot):
        return BFLOAT16

    def band(self, slot):
        return None

    def cost(self, slot):
        return 1 << 20

    def read(self, slot, start, stop):
        rng = np.random.default_rng([zlib.crc32(slot.name.encode()), start])
        bits = rng.integers(0, 1 << 16, (stop - start) * slot.cols, np.uint16) & 0xBFFF  # exponents of finite numbers
        return bits.view(BFLOAT16).reshape(stop - start, *slot.shape[1:])


def write_random(directory: Path, config: MixtralConfig) -> None:
    """A hub directory of shards of at most 5 GB."""
    directory.mkdir(parents=True)
    source = Random(config)
    with TensorSink(Directory(directory), source, source.dtype, max_bytes=5 * 10**9) as sink:
        copy(source, sink, source.dtype)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))


def forget(directory: Path) -> None:
    """Drop the files of a directory from the page cache, so that every contestant reads from disk."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_files(source: Path, target: Path) -> float:
    """Seconds that `cp -r` takes until everything is on disk."""
    forget(source)
    script = f"cp -r {source} {target} && find {target} -type f -exec sync {{}} +"
    code = "import subprocess, sys, time; t = time.perf_counter(); subprocess.run(sys.argv[1], shell=True, check=True)"
    code += "; print(time.perf_counter() - t)"
    seconds = float(subprocess.run([sys.executable, "-c", code, script], check=True, capture_output=True).stdout)
    shutil.rmtree(target)
    return seconds


def convert(command: str, source: Path, target: Path) -> dict[str, float]:
    """Run one conversion in a fresh process."""
    forget(source)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, command, str(source), str(target)], check=True, stdout=subprocess.PIPE
    )
    return json.loads(child.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    config = MixtralConfig.preset("mixtral-8x7b", num_hidden_layers=options.layers)
    root: Path = options.directory / "convert-bench"
    shutil.rmtree(root, ignore_errors=True)
    hub, orbax, back = root / "hub", root / "orbax", root / "back"
    write_random(hub, config)
    size = 2 * config.num_params()
    largest = max(s.rows * s.cols * 2 for s in slots(config))
    bound = 1.5e9 + 2 * largest
    rows = []
    for command, source, target in (("hf2orbax", hub, orbax), ("orbax2hf", orbax, back)):
        copied = copy_files(source, root / "copy")
        ours = convert(command, source, target)
        share = copied / ours["seconds"]
        rows.append((command, size / copied / 1e6, size / ours["seconds"] / 1e6, share, ours["peak"] / 1e6))
        assert ours["peak"] <= bound, f"{command} took {ours['peak']:,} bytes of memory, bound {bound:,.0f}"
    print(f"checkpoint {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, memory bound {bound / 1e6:.0f} MB")
    print("| | `cp` MB/s | ours MB/s | share | peak memory MB |\n|---|---|---|---|---|")
    for command, cp, ours_rate, share, peak in rows:
        print(f"| {command} | {cp:.0f} | {ours_rate:.0f} | {share:.0%} | {peak:.0f} |")
    first, second = HfSource(hub), HfSource(back)
    for a, b in zip(first.slots, second.slots, strict=True):
        assert first.read(a, 0, a.rows).tobytes() == second.read(b, 0, b.rows).tobytes(), a.name
    print("every byte came back")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
