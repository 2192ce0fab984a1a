"""theirs.py as an expert would run it here: freed memory is kept (train/memory.py), and MKL takes its fast path.

MKL takes that path where its function `mkl_serv_intel_cpu_true` says so: on other makers' processors it is replaced.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def can_be_tuned() -> bool:
    """Whether this is Linux, and has a C compiler."""
    return CPUINFO.exists() and shutil.which("cc") is not None


if __name__ == "__main__":
    environment = dict(os.environ)
    if "GenuineIntel" not in CPUINFO.read_text(encoding="utf-8"):
        shim = Path(tempfile.gettempdir(), "mkl_fast_path.so")
        source = b"int mkl_serv_intel_cpu_true() { return 1; }"
        subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", str(shim)], input=source, check=True)
        environment["LD_PRELOAD"] = str(shim)
    command = [sys.executable, "-m", "tests.bench.kept", "tests.bench.theirs", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)
