"""From work and traffic to time: what bounds the step, and the best MFU that it allows."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from mixtral_jax.train.config.schema import RunConfig
from mixtral_jax.train.plan.chips import NODE_GPUS, Topology
from mixtral_jax.train.plan.closed_form import memory_traffic, useful


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

    @property
    def likely(self) -> float:
        """Seconds with half of the traffic hidden: between the two bounds."""
        return (self.seconds + max(self.compute, self.memory) + self.network) / 2


def roofline(
    config: RunConfig, topology: Topology, *, flops: float, traffic: Mapping[tuple[str, str], float]
) -> Roofline | None:
    """`flops` are all that a chip computes, `traffic` what it sends by kind and mesh axes; None for an unknown chip."""
    chip, sizes = topology.chip, config.mesh.sizes(topology.chips)
    if not chip.flops:
        return None
    seconds = {
        "compute": flops / chip.flops,
        "memory": memory_traffic(config, sizes) / chip.memory_bandwidth,
        "network": sum(amount / bandwidth(topology, axes, sizes) for (_, axes), amount in traffic.items()),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    causal, full = (amount / chip.flops for amount in useful(config, sizes))
    serial = max(seconds["compute"], seconds["memory"]) + seconds["network"]
    longest = seconds[bound]
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
