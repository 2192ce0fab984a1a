"""Seconds a token of generation on eight virtual CPU devices: weights gathered once a call and in every step, in turn.

`python -m tests.bench.generation_mesh TOKENS ROUNDS`: medians, with least and most.
"""

import os
import statistics
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from flax import nnx

from mixtral_jax.config import MixtralConfig
from mixtral_jax.generation import generate
from mixtral_jax.model import Mixtral
from mixtral_jax.parallel import MeshConfig, make_mesh, param_shardings, whole

CONFIG = MixtralConfig.preset("tiny")
MESHES = ({"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 4})


def measure(sizes: dict[str, int], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a token of both ways."""
    model, mesh = Mixtral(CONFIG, key=jax.random.key(0)), make_mesh(MeshConfig(**{"data": 1, **sizes}))
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.device_put(nnx.to_pure_dict(state), param_shardings(model, mesh)))
    prompts = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (8, 16)).astype(np.int32)
    known, seconds = whole.free_memory, {"once per call": [], "in every step": []}
    with jax.set_mesh(mesh):
        for i in range(rounds + 1):
            for way, taken in seconds.items():
                whole.free_memory = known if way == "once per call" else lambda: 0.0
                start = time.perf_counter()
                generate(model, prompts, max_new_tokens=tokens)
                taken += [(time.perf_counter() - start) / tokens] * (i > 0)  # the first compiles
    whole.free_memory = known
    return seconds


if __name__ == "__main__":
    for sizes in MESHES:
        for way, taken in measure(sizes, *map(int, sys.argv[1:])).items():
            each = [1e3 * t for t in (statistics.median(taken), min(taken), max(taken))]
            print(" x ".join(f"{a} {n}" for a, n in sizes.items()), way, "{:.1f} ({:.1f} to {:.1f}) ms".format(*each))
