"""The mesh: sizes of its axes, and the devices in it."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Self

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from pydantic import Field, model_validator

from mixtral_jax.config import FrozenConfig
from mixtral_jax.parallel.compiler_quirks import remember_torus

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("data", "fsdp", "expert")  # share the rows of a batch
TOKEN_AXES = (*BATCH_AXES, "context")
# Off TPU neighbouring devices, of one node, are neighbours along the first of these that has any: the axes by how much
# they say in each layer, and how little of it hides behind compute.
NEAREST_FIRST = ("tensor", "expert", "context", "fsdp", "data")


class MeshConfig(FrozenConfig):
    """Sizes of the mesh axes; at most one is -1, which takes the devices that are left."""

    data: int = Field(-1, description="replicas of the parameters; shares the batch")
    fsdp: int = Field(1, description="shards parameters and the batch")
    expert: int = Field(1, description="shards experts, dense parameters and the batch")
    tensor: int = Field(1, description="shards heads, ffn and vocabulary")
    context: int = Field(1, description="shards the sequence")
    dcn_data: int = Field(1, gt=0, description="slices or nodes along data, outside the fast network")
    dcn_fsdp: int = Field(1, gt=0, description="slices or nodes along fsdp, outside the fast network")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        sizes = {a: getattr(self, a) for a in MESH_AXES}
        for axis, size in sizes.items():
            if size == 0 or size < -1:
                raise ValueError(f"mesh.{axis} is {size}: it must be a positive size or -1")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"more than one mesh axis is -1: {', '.join(a for a, s in sizes.items() if s == -1)}")
        return self

    @property
    def slow(self) -> dict[str, int]:
        """The part of each axis that lies outside the fast network."""
        return dict.fromkeys(MESH_AXES, 1) | {"data": self.dcn_data, "fsdp": self.dcn_fsdp}

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of every axis, over fast and slow network together, for `num_devices` devices.

        Raises:
            ValueError: the product of the sizes is not the number of devices.
        """
        sizes = {a: getattr(self, a) for a in MESH_AXES}
        known = math.prod(s for s in sizes.values() if s != -1) * math.prod(self.slow.values())
        free = [a for a, s in sizes.items() if s == -1]
        if free:
            if num_devices % known:
                raise ValueError(
                    f"mesh: {num_devices} devices are not a multiple of {known}, the product of the axes other than "
                    f"mesh.{free[0]}: make one of them smaller"
                )
            sizes[free[0]] = num_devices // known
        elif known != num_devices:
            named = sizes | {"dcn_data": self.dcn_data, "dcn_fsdp": self.dcn_fsdp}
            shape = " x ".join(f"{a} {s}" for a, s in named.items())
            raise ValueError(
                f"mesh: {shape} = {known} devices, but there are {num_devices}: set one axis to -1, which takes what "
                "the others leave"
            )
        return {a: s * self.slow[a] for a, s in sizes.items()}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh over `devices` (all by default), or None for a single device, where nothing is sharded.

    Raises:
        ValueError: the mesh does not fit the devices, or dcn_data x dcn_fsdp not their slices or nodes.
    """
    devices = list(jax.devices() if devices is None else devices)
    grid = device_grid(config, devices)
    if len(devices) == 1:
        return None
    mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    if devices[0].platform == "tpu" and config.dcn_data * config.dcn_fsdp == 1:
        remember_torus(mesh)
    return mesh


def device_grid(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices by their place along MESH_AXES. Slices (or nodes) are the slowest part of the axes that they share.

    Inside one, a TPU's torus decides who are neighbours, elsewhere NEAREST_FIRST.

    Raises:
        ValueError: see make_mesh.
    """
    sizes = config.sizes(len(devices))
    fast = tuple(sizes[a] // config.slow[a] for a in MESH_AXES)
    grids = np.stack([_inside_slice(fast, group) for group in _slices(config, devices)])
    split = grids.reshape(config.dcn_data, config.dcn_fsdp, *fast)
    return np.moveaxis(split, 1, 2).reshape(tuple(sizes[a] for a in MESH_AXES))


def _inside_slice(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu":
        grid = np.empty(len(devices), object)
        grid[:] = sorted(devices, key=lambda d: (d.process_index, d.id))
        order = [MESH_AXES.index(axis) for axis in reversed(NEAREST_FIRST)]
        return grid.reshape([shape[i] for i in order]).transpose(np.argsort(order))
    from jax.experimental import mesh_utils

    # a physical axis is split only where it must be, such as 8 x 8 on 4 x 4 x 4
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _slices(config: MeshConfig, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """dcn_data x dcn_fsdp groups of devices: TPU slices, or where there are none runs of whole processes."""
    count = config.dcn_data * config.dcn_fsdp
    if count == 1:
        return [list(devices)]
    kind, key = "slice", lambda d: getattr(d, "slice_index", None) or 0
    if len(set(map(key, devices))) == 1:
        kind, key = "process", lambda d: d.process_index
    groups: dict[int, list[jax.Device]] = {}
    for device in devices:
        groups.setdefault(key(device), []).append(device)
    found = [groups[k] for k in sorted(groups)]
    if len(found) % count or (kind == "slice" and len(found) != count):
        raise ValueError(
            f"mesh: dcn_data {config.dcn_data} x dcn_fsdp {config.dcn_fsdp} = {count} groups outside the fast network, "
            f"but the devices are in {len(found)} {kind}{'s' * (kind == 'slice') or 'es'}: "
            f"make mesh.dcn_data {len(found)}, or 1 where one fast network joins all"
        )
    if len({len(group) for group in found}) > 1:
        each = ", ".join(str(len(group)) for group in found)
        raise ValueError(f"mesh: every {kind} must have as many devices as the others, but they have {each}")
    together = len(found) // count
    return [list(chain(*found[i : i + together])) for i in range(0, len(found), together)]
