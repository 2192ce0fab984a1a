"""From work and traffic to time: what bounds the step, and the best MFU that it allows."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mixtral_jax.train.plan.chips import NODE_GPUS, Topology
from mixtral_jax.train.plan.hlo import Collective

# Bytes that leave a chip for each byte of the larger side of a collective over n chips.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


class Roofline(NamedTuple):
    """Seconds of one step if each resource were all that counts, and the best that they allow together."""

    compute: float
    memory: float
    network: float
    bound: str
    mfu: float  # useful FLOPs (all pairs of attention) over peak, when everything overlaps with the slowest
    mfu_causal: float
    mfu_serial: float  # all pairs, when the network hides behind nothing

    @property
    def seconds(self) -> float:
        """The slowest of the three."""
        return max(self.compute, self.memory, self.network)


def roofline(
    topology: Topology,
    *,
    flops: float,
    useful: tuple[float, float],
    memory_bytes: float,
    sent: Mapping[str, float],
    sizes: Mapping[str, int],
) -> Roofline:
    """`flops` are all that are computed, `useful` those of the model (causal, all pairs); `sent` bytes by mesh axis."""
    chip = topology.chip
    seconds = {
        "compute": flops / chip.flops,
        "memory": memory_bytes / chip.memory_bandwidth,
        "network": sum(amount / bandwidth(topology, axis, sizes) for axis, amount in sent.items()),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    causal, full = (amount / chip.flops for amount in useful)
    longest = seconds[bound]
    serial = max(seconds["compute"], seconds["memory"]) + seconds["network"]
    return Roofline(**seconds, bound=bound, mfu=full / longest, mfu_causal=causal / longest, mfu_serial=full / serial)


def bandwidth(topology: Topology, axes: str, sizes: Mapping[str, int]) -> float:
    """Bytes a second out of one chip along mesh axes such as `fsdp+expert`: those links of the torus that they use."""
    chip, count = topology.chip, math.prod(sizes.get(a, 1) for a in axes.split("+"))
    if chip.torus == 0:
        inside = topology.chips <= NODE_GPUS or (count <= NODE_GPUS and axes in ("expert", "tensor", "context"))
        return chip.network if inside else chip.slow_network
    if topology.slices > 1 and axes == "data":
        return chip.slow_network
    dims = math.ceil(chip.torus * math.log(max(count, 2)) / math.log(max(topology.chips_per_slice, 2)) - 1e-9)
    return chip.network * min(dims, chip.torus) / chip.torus


def sent_by_axis(
    collectives: tuple[Collective, ...], mesh_shape: Mapping[str, int], ragged_share: float
) -> dict[tuple[str, str], float]:
    """(kind, mesh axes) -> bytes that one chip sends in a step.

    A ragged all-to-all sends the rows that exist, not its buffer: `ragged_share` of it.
    """
    total: defaultdict[tuple[str, str], float] = defaultdict(float)
    for c in collectives:
        count = len(c.groups[0]) if c.groups else math.prod(mesh_shape.values())
        if count > 1:
            share = ragged_share if c.kind == "ragged-all-to-all" else 1.0
            total[c.kind, axes_of(c, mesh_shape)] += c.bytes * c.times * share * SENT[c.kind](count)
    return dict(total)


def axes_of(c: Collective, mesh_shape: Mapping[str, int]) -> str:
    """The mesh axes along which the devices of a group differ, joined by +."""
    live = [a for a, n in mesh_shape.items() if n > 1]
    if not c.groups:
        return "+".join(live)
    places = np.array(np.unravel_index(np.array(c.groups[0]), tuple(mesh_shape.values())))
    varying = [a for a, row in zip(mesh_shape, places, strict=True) if len(set(row.tolist())) > 1]
    return "+".join(varying) or "+".join(live)
