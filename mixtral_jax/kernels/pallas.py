"""What a Pallas kernel needs to run inside our shard_map, which checks how values vary over the mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from mixtral_jax.parallel import variance, varying


def unchecked(run: Callable[..., Any], *args: Any) -> Any:
    """run(*args) without the check of variance, its results then typed as varying like the arguments.

    Kernels of JAX's library do not declare how their outputs vary. Left as they are, results would be typed as equal
    on all devices. Not differentiable: forward and backward of a kernel are each wrapped, inside one custom_vjp.
    """
    axes = tuple(sorted(frozenset[str]().union(*map(variance, jax.tree.leaves(args)))))
    if not axes:
        return run(*args)
    out = jax.shard_map(run, in_specs=P(), out_specs=P(), axis_names=set(), check_vma=False)(*args)
    return jax.tree.map(lambda x: varying(x, axes), out)
