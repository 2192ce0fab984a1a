"""Benchmarks on files of this machine, and the scorer of programs."""

from mixtral_jax.train.evals.tasks.code import CodeEval, own_code_eval, pass_at_k, passes
from mixtral_jax.train.evals.tasks.local import PREFIX, harness, listing, rows, with_local
