"""NVIDIA GPUs that are not there: what XLA's compiler must be told of each, and what libraries ask of a live one.

Compiled with the CUDA plugin alone (the extra `aot-gpu`), never run. The figures are OpenXLA's own, read from devices:
xla/backends/gpu/target_config/specs/{a100_sxm_80,a100_sxm_40,h100_sxm,h200,b200}.txtpb, as jax-cuda13-pjrt 0.12.0.1
carries them.
"""

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax

MEMORY_SHARE = 0.9  # of a GPU's memory, for XLA (mixtral_jax/__init__.py); CUDA, NCCL and cuDNN have the rest
CUDNN, CUDA = (9, 10), (13, 0)  # versions that a program is compiled for


class Gpu(NamedTuple):
    """What differs between GPUs in XLA's GpuTargetConfigProto, in its units, and what tokamax asks of a device."""

    device_kind: str
    compute_capability: str
    core_count: int  # streaming multiprocessors
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int
    memory_bandwidth: int
    l2_cache_size: int
    clock_rate_ghz: float
    memory: int  # bytes, as the driver shows them
    platform: str = "gpu"

    @property
    def target(self) -> str:
        """The description as a text proto. `a` behind sm_90 and sm_100: products in the tensor cores of these alone."""
        major, minor = self.compute_capability.split(".")
        extension = "ACCELERATED_FEATURES" if int(major) >= 9 else "NONE"
        return f"""gpu_device_info {{
            threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
            block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
            shared_memory_per_core: {self.shared_memory_per_core}
            shared_memory_per_block_optin: {self.shared_memory_per_block_optin}
            core_count: {self.core_count} fpus_per_core: {self.fpus_per_core} clock_rate_ghz: {self.clock_rate_ghz}
            memory_bandwidth: {self.memory_bandwidth} l2_cache_size: {self.l2_cache_size}
            device_memory_size: {self.memory}
            cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
        }}
        platform_name: "CUDA" device_description_str: "{self.device_kind}"
        dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}
        runtime_version {{ major: {CUDA[0]} minor: {CUDA[1]} }}"""


_A100 = ("8.0", 108, 64, 167936, 166912)
_H100 = ("9.0", 132, 128, 233472, 232448)
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", *_A100, 2039040000000, 41943040, 1.41, 85100068864),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", *_A100, 1555200000000, 41943040, 1.41, 42331013120),
    "h100": Gpu("NVIDIA H100 80GB HBM3", *_H100, 3352320000000, 52428800, 1.98, 84942979072),
    "h200": Gpu("NVIDIA H200", *_H100, 4800000000000, 52428800, 1.98, 151397597184),
    "b200": Gpu("NVIDIA B200", "10.0", 148, 128, 233472, 232448, 7672320000000, 132644864, 1.965, 191514411008),
}


def has_cuda_plugin() -> bool:
    """Whether jax's plugin for CUDA, which is the compiler, is installed (the extra `aot-gpu`, or `cuda`)."""
    with contextlib.suppress(ModuleNotFoundError):  # of jax_plugins itself
        return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (13, 12))
    return False


def devices(kind: str, nodes: int, each: int) -> list[jax.Device]:
    """Of `nodes` nodes, one process for each, with `each` GPUs."""
    from jax.experimental import topologies

    topology = f"1x{nodes}x{each}"
    return topologies.get_topology_desc(platform="cuda", target_config=GPUS[kind].target, topology=topology).devices


@contextlib.contextmanager
def there(kind: str) -> Iterator[None]:
    """Lowering and compiling as if this process had such a GPU.

    tokamax asks what the default device is before it chooses a kernel, reads flags from the command line, which is
    ours, and says at every call that no kernel was tuned for our shapes.
    """
    from jax.extend import backend

    log, own, arguments = logging.getLogger("absl"), backend.get_default_device, sys.argv
    level = log.level
    try:
        backend.get_default_device, sys.argv = lambda: GPUS[kind], arguments[:1]
        log.setLevel(logging.ERROR)
        yield
    finally:
        backend.get_default_device, sys.argv = own, arguments
        log.setLevel(level)
