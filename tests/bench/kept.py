"""Run one of our modules as launch.py runs training: `python -m tests.bench.kept MODULE ARGUMENTS`."""

import runpy
import sys

from mixtral_jax.train.memory import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
