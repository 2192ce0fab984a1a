"""Every kernel that runs here beside its oracle in float64, forward and gradients: a line of JSON for each.

`python -m tests.bench.gpu_kernels [T]`: rows of T tokens (default 256), packed, padded, with a window; fp32 and bf16.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import ComputeConfig, MoeConfig
from mixtral_jax.kernels.attention import attend
from mixtral_jax.kernels.choice import AttentionShape, choose_attention, choose_matmul
from mixtral_jax.kernels.grouped import grouped_matmul
from mixtral_jax.parallel import machine, platform
from tests.attention_cases import Case, make
from tests.oracles.attention import attention
from tests.oracles.moe import grouped_matmul as grouped_oracle

FARTHEST = {"float32": 3e-3, "bfloat16": 3e-2}  # of the norm; products of fp32 are TF32 on GPUs
# kernels of one platform alone
ELSEWHERE = {"splash": "tpu", "megablox": "tpu", "tokamax": "gpu", "cudnn": "gpu", "triton": "gpu"}


def backends(config: type[Any], field: str, auto: str) -> Iterator[str]:
    """Those that this platform may have, the one of `auto` first."""
    names = get_args(config.model_fields[field].annotation)
    yield auto
    yield from (n for n in names if n not in ("auto", auto) and ELSEWHERE.get(n, platform()) == platform())


def farthest(got: Sequence[Any], want: Sequence[np.ndarray]) -> list[float]:
    """Norm of each difference through the norm of what is right."""
    arrays = [np.asarray(a, np.float64) for a in got]
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(arrays, want, strict=True)]


def compared(kernel: str, dtype: str, run: Callable[..., Any], arrays: Sequence[Any], want: Any) -> dict[str, Any]:
    """One line: value and gradients of `run` on `arrays` in `dtype` beside what is right for the rounded numbers."""
    line: dict[str, Any] = {"kernel": kernel, "dtype": dtype, "farthest": FARTHEST[dtype]}
    rounded = [jnp.asarray(a, dtype) for a in arrays]
    try:
        got = jax.jit(run)(*rounded)
    except (ValueError, NotImplementedError, RuntimeError, ImportError) as error:  # libraries say so of a device
        return line | {"absent": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}
    return line | {"errors": farthest(got, want(*(np.asarray(a, np.float32) for a in rounded)))}


def attention_lines(T: int) -> Iterator[dict[str, Any]]:
    """Rows of two documents and padding, 8 query heads on 2, with and without a window."""
    auto = choose_attention("auto", machine(), AttentionShape(T, T, 64, "bfloat16")).kernel
    for window in (None, T // 3):
        case = Case(B=2, T=T, N=8, K=2, H=64, lengths=(T // 2, T // 3), window=window)
        inputs = make(case)
        for backend in backends(ComputeConfig, "attention", auto):
            attending = partial(attend, **inputs.tokens, window=window, backend=backend)

            def run(q: Any, k: Any, v: Any, g: Any, attending: Any = attending) -> tuple[Any, ...]:
                out, pull = jax.vjp(attending, q, k, v)
                return out, *pull(g)

            name = f"attention {backend}" + ", window" * (window is not None)
            for dtype in FARTHEST:
                yield {"chosen": backend == auto} | compared(
                    name, dtype, run, inputs.arrays, lambda *a, m=inputs.mask: attention(*a[:3], m, a[3])
                )


def grouped_lines(rows: int) -> Iterator[dict[str, Any]]:
    """Rows of 8 experts, one of them without any, and some rows of nobody."""
    D, F, E = 128, 256, 8
    rng = np.random.default_rng(0)
    ends = np.sort(rng.integers(0, rows - 10, E - 1))
    sizes = np.diff([0, *ends, ends[-1]]).astype(np.int32)
    used = (np.arange(rows) < sizes.sum())[:, None]
    x, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((rows, D), (E, D, F), (rows, F)))
    auto = choose_matmul("auto", machine()).kernel
    for backend in backends(MoeConfig, "matmul", auto):

        def run(x: Any, w: Any, g: Any, backend: str = backend) -> tuple[Any, ...]:
            y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
            return jnp.where(used, y, 0), *pull(jnp.where(used, g, 0))

        for dtype in FARTHEST:
            yield {"chosen": backend == auto} | compared(
                f"experts {backend}", dtype, run, (x, w, g), lambda x, w, g: grouped_oracle(x, w, sizes, g)
            )


if __name__ == "__main__":
    T = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    for line in (*attention_lines(T), *grouped_lines(2 * T)):
        print(json.dumps(line), flush=True)
