"""Chips and slices: published figures, and the names that clouds and libtpu give to the same machine.

Sources, read November 2026: cloud.google.com/tpu/docs/v5e, /v5p and /v6e (peak compute, HBM capacity and bandwidth,
interchip bandwidth per chip); NVIDIA's data sheets of A100, H100, H200 and HGX B200 (SXM; dense bf16 is half of the
figure with sparsity, NVLink one way half of that of both). `memory` is what a program may take: of a TPU the limit that
libtpu's compiler itself enforces, found by compiling programs that do not fit (sold as 16, 95 and 32 GB); of a GPU the
share that is left to XLA, of the bytes that the driver shows (plan/gpus.py).
"""

import math
import os
import re
from typing import NamedTuple

from mixtral_jax.parallel import Machine
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.plan.gpus import GPUS, MEMORY_SHARE


class Chip(NamedTuple):
    """Per-chip figures: FLOP/s (0: unknown), bytes, bytes/s. Network: all links together, both directions once."""

    name: str
    flops: float  # dense bf16
    memory: float  # that a program may take
    memory_bandwidth: float
    network: float  # out of the chip inside its slice or node (a GPU's NVLink: one way)
    slow_network: float  # out of the chip between slices or nodes
    torus: int  # dimensions of the fast network; 0: a switch


# Dense bf16 FLOP/s of one jax device, by a part of its device_kind in lower case. First match counts.
PEAK_FLOPS = {
    "tpu v5p": 459e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v6": 918e12,
    "gb200": 2500e12,
    "b200": 2250e12,
    "h200": 989e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "a100": 312e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device; None where no figure is known (CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind.lower()), None)


CHIPS = {
    "v5e": Chip("v5e", PEAK_FLOPS["tpu v5e"], 15.75 * 2**30, 819e9, 200e9, 3.1e9, 2),
    "v5p": Chip("v5p", PEAK_FLOPS["tpu v5p"], 95.74 * 2**30, 2765e9, 600e9, 6.25e9, 3),
    "v6e": Chip("v6e", PEAK_FLOPS["tpu v6"], 31.25 * 2**30, 1638e9, 448e9, 12.5e9, 2),
    # 400 Gb/s a GPU between nodes (DGX H100 and B200: eight ConnectX-7), on A100 200 Gb/s (DGX A100: eight ConnectX-6)
    "a100": Chip("a100", PEAK_FLOPS["a100"], GPUS["a100"].memory * MEMORY_SHARE, 2039e9, 300e9, 25e9, 0),
    "a100-40gb": Chip("a100-40gb", PEAK_FLOPS["a100"], GPUS["a100-40gb"].memory * MEMORY_SHARE, 1555e9, 300e9, 25e9, 0),
    "h100": Chip("h100", PEAK_FLOPS["h100"], GPUS["h100"].memory * MEMORY_SHARE, 3350e9, 450e9, 50e9, 0),
    "h200": Chip("h200", PEAK_FLOPS["h200"], GPUS["h200"].memory * MEMORY_SHARE, 4800e9, 450e9, 50e9, 0),
    "b200": Chip("b200", PEAK_FLOPS["b200"], GPUS["b200"].memory * MEMORY_SHARE, 8000e9, 900e9, 50e9, 0),
}

# The torus of a slice, as libtpu wants it, by the number in the slice's name: chips, and for v5p cores, two to a chip.
_TORUS_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_TORUS_3D = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "4x4x2", 128: "4x4x4", 256: "8x4x4", 512: "8x8x4", 1024: "8x8x8"
}  # fmt: skip
SLICES = {"v5p": _TORUS_3D, "v5e": _TORUS_2D, "v6e": _TORUS_2D}
V5P_CHIPS = 8960  # of a whole pod
NODE_GPUS = 8  # GPUs that share a switch


class Topology(NamedTuple):
    """A machine to plan for."""

    name: str
    chip: Chip
    slices: int
    chips_per_slice: int
    libtpu: str | None  # libtpu's name of one slice; None: not a TPU

    @property
    def chips(self) -> int:
        """Chips in all."""
        return self.slices * self.chips_per_slice

    @property
    def is_gpu(self) -> bool:
        """Whether nodes of GPUs are joined by a slower network."""
        return self.chip.name in GPUS

    @property
    def machine(self) -> Machine:
        """What a choice of kernels asks for."""
        if self.is_gpu:
            return Machine("gpu", GPUS[self.chip.name].device_kind)
        return Machine("tpu", f"TPU {self.chip.name}") if self.libtpu else Machine("cpu")


def parse_topology(name: str, between_nodes: float | None = None) -> Topology:
    """`v5p-64`, `v6e-256`, `2xv5e-256`, `v5p:4x4x4`, `h100-64`, `2xh100-8`.

    v5p names count cores, two to a chip; v5e and v6e names count chips, the others GPUs. `between_nodes`: Gb/s of one
    chip between nodes or slices, in place of what CHIPS says.

    Raises:
        UserError: unknown name; the known ones are listed.
    """
    found = None
    if match := re.fullmatch(r"(?:0*([1-9]\d*)x)?(v5e|v5p|v6e)(?:-(\d+)|:(\d+(?:x\d+)+))", name):
        slices, kind, shape = int(match[1] or 1), match[2], match[4] or SLICES[match[2]].get(int(match[3]), "")
        if _is_slice(kind, shape):
            found = Topology(name, CHIPS[kind], slices, math.prod(map(int, shape.split("x"))), f"{kind}:{shape}")
    elif match := re.fullmatch(rf"(?:0*([1-9]\d*)x)?({'|'.join(GPUS)})-0*([1-9]\d*)", name):
        machines, kind, each = int(match[1] or 1), match[2], int(match[3])
        if each % NODE_GPUS == 0 or (machines == 1 and each < NODE_GPUS):
            found = Topology(name, CHIPS[kind], 1, machines * each, None)
    if found is not None:
        chip = found.chip._replace(slow_network=between_nodes * 1e9 / 8) if between_nodes else found.chip
        return found._replace(chip=chip)
    known = ", ".join(f"{kind}-{count}" for kind, slices in SLICES.items() for count in slices)
    raise UserError(
        f"unknown topology {name!r}: known are {known}, the same by their shapes (v5e:4x8), v5p shapes of multiples of "
        f"4 (v5p:4x4x12), several slices (2xv5e-256), and of GPUs {'-N, '.join(GPUS)}-N with N from 1 to {NODE_GPUS} "
        f"or whole nodes of {NODE_GPUS} (h100-64, 8xh100-8)"
    )


def _is_slice(kind: str, shape: str) -> bool:
    """v5e and v6e come in the shapes above; v5p in any that are made of cubes of 4, and the parts of one."""
    known = SLICES[kind].values()
    if kind != "v5p" or not shape:
        return shape in known
    sides = sorted(int(side) for side in shape.split("x"))
    cubes = len(sides) == 3 and all(side and side % 4 == 0 for side in sides) and math.prod(sides) <= V5P_CHIPS
    return cubes or sides in [sorted(map(int, part.split("x"))) for part in known]


def local_machine(devices: int) -> Topology:
    """This machine's CPU as `devices` devices that share its memory. Its rates are not known: nobody publishes them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return Topology(f"{devices} local CPU devices", Chip("cpu", 0, memory, 0, 0, 0, 0), 1, devices, None)


def larger(topology: Topology) -> list[Topology]:
    """Machines of the same chips and as many slices, with more chips in each, the smallest first."""
    kind, slices = topology.chip.name, topology.slices
    counts = SLICES.get(kind, [2**n for n in range(11)])
    machines = [parse_topology(f"{f'{slices}x' if slices > 1 else ''}{kind}-{n}") for n in counts]
    return [m for m in machines if m.chips > topology.chips]
