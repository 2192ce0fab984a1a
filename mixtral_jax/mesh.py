"""The mesh: sizes of its axes, and the devices in it."""

import math
from collections.abc import Sequence
from typing import Self

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from pydantic import Field, model_validator

from mixtral_jax.collectives import remember_torus
from mixtral_jax.config import FrozenConfig

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")


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

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of every axis, over fast and slow network together, for `num_devices` devices.

        Raises:
            ValueError: the product of the sizes is not the number of devices.
        """
        sizes = {a: getattr(self, a) for a in MESH_AXES}
        slow = {"data": self.dcn_data, "fsdp": self.dcn_fsdp}
        known = math.prod(s for s in sizes.values() if s != -1) * math.prod(slow.values())
        free = [a for a, s in sizes.items() if s == -1]
        if free:
            if num_devices % known:
                raise ValueError(f"mesh: {num_devices} devices are not a multiple of {known}, the product of the axes")
            sizes[free[0]] = num_devices // known
        elif known != num_devices:
            shape = " x ".join(f"{a} {s}" for a, s in (sizes | {f"dcn_{a}": s for a, s in slow.items()}).items())
            raise ValueError(f"mesh: {shape} = {known} devices, but there are {num_devices}")
        return {a: s * slow.get(a, 1) for a, s in sizes.items()}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh over `devices` (all by default), or None for a single device, where nothing is sharded."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    if len(devices) == 1:
        return None
    shape = tuple(sizes[a] for a in MESH_AXES)
    if config.dcn_data * config.dcn_fsdp > 1:
        from jax.experimental import mesh_utils

        slow = (config.dcn_data, config.dcn_fsdp, 1, 1, 1)
        fast = tuple(n // s for n, s in zip(shape, slow, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(fast, slow, devices)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    if devices[0].platform == "cpu":
        return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    from jax.experimental import mesh_utils

    # a physical axis is split only where it must be, such as 8 x 8 on 4 x 4 x 4
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    remember_torus(mesh)
    return mesh
