"""Chips and slices: published figures, and the names that clouds and libtpu give to the same machine.

Sources, read November 2026: cloud.google.com/tpu/docs/v5e, /v5p and /v6e (peak compute, HBM capacity and bandwidth,
interchip bandwidth per chip); NVIDIA H100 data sheet (SXM, dense bf16). `memory` is what a program may take: the limit
that libtpu's compiler itself enforces for the chip, found by compiling programs that do not fit (sold as 16, 95, 32 and
80 GB).
"""

import math
import os
import re
from typing import NamedTuple

from mixtral_jax.train.errors import UserError


class Chip(NamedTuple):
    """Per-chip figures: FLOP/s (0: unknown), bytes, bytes/s. Network: all links together, both directions once."""

    name: str
    flops: float  # dense bf16
    memory: float  # that a program may take
    memory_bandwidth: float
    network: float  # out of the chip inside its slice or node
    slow_network: float  # out of the chip between slices or nodes
    torus: int  # dimensions of the fast network; 0: a switch


# Dense bf16 FLOP/s of one jax device, by a part of its device_kind in lower case. First match counts.
PEAK_FLOPS = {
    "tpu v5p": 459e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v6": 918e12,
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
    "h100": Chip("h100", PEAK_FLOPS["h100"], 80e9 * 0.94, 3350e9, 450e9, 50e9, 0),
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


def parse_topology(name: str) -> Topology:
    """`v5p-64`, `v6e-256`, `2xv5e-256`, `v5p:4x4x4`, `h100-64`.

    v5p names count cores, two to a chip; v5e and v6e names count chips, h100 names GPUs.

    Raises:
        UserError: unknown name; the known ones are listed.
    """
    if match := re.fullmatch(r"(?:0*([1-9]\d*)x)?(v5e|v5p|v6e)(?:-(\d+)|:(\d+(?:x\d+)+))", name):
        slices, kind, shape = int(match[1] or 1), match[2], match[4] or SLICES[match[2]].get(int(match[3]), "")
        if _is_slice(kind, shape):
            return Topology(name, CHIPS[kind], slices, math.prod(map(int, shape.split("x"))), f"{kind}:{shape}")
    elif match := re.fullmatch(r"(?:0*([1-9]\d*)x)?h100-0*([1-9]\d*)", name):
        machines, each = int(match[1] or 1), int(match[2])
        if each % NODE_GPUS == 0 or (machines == 1 and each < NODE_GPUS):
            return Topology(name, CHIPS["h100"], 1, machines * each, None)
    known = ", ".join(f"{kind}-{count}" for kind, slices in SLICES.items() for count in slices)
    raise UserError(
        f"unknown topology {name!r}: known are {known}, h100-N (up to 8, or whole nodes of {NODE_GPUS}), "
        "the same by their shapes (v5e:4x8), v5p shapes of multiples of 4 (v5p:4x4x12), and several slices (2xv5e-256)"
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
    counts = SLICES.get(kind, [2**n for n in range(3, 11)])
    machines = [parse_topology(f"{f'{slices}x' if slices > 1 else ''}{kind}-{n}") for n in counts]
    return [m for m in machines if m.chips > topology.chips]
