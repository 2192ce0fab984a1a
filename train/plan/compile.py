"""Ahead-of-time compilation of the very step that a run would take, for devices that need not be there."""

import contextlib
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from data.batch import Batch
from mixtral_jax.mesh import make_mesh
from mixtral_jax.model import Mixtral, abstract_model
from mixtral_jax.sharding import batch_sharding, param_shardings
from train.build import OBJECTIVES
from train.config import RunConfig
from train.errors import UserError
from train.optimizer import make_optimizer
from train.plan.chips import Topology
from train.state import TrainState, abstract_state
from train.step import make_train_step


class Memory(NamedTuple):
    """Bytes on one device."""

    parameters: float
    optimizer: float
    temporaries: float  # activations, gathered weights, gradients, at their highest
    code: float
    peak: float
    limit: float
    too_much: float = 0.0  # by how much the compiler refused it


class Compiled(NamedTuple):
    """What the compiler says of one step."""

    memory: Memory
    text: str  # "" where it does not fit
    seconds: float


def plan_mesh(config: RunConfig, topology: Topology | None) -> jax.sharding.Mesh | None:
    """The mesh of the run on a TPU slice, or on this machine's devices.

    Raises:
        UserError: libtpu is missing.
        ValueError: the mesh does not fit the number of devices.
    """
    if topology is None:
        return make_mesh(config.mesh)
    if not has_libtpu():
        raise UserError("compiling for a TPU needs libtpu: pip install 'mixtral-jax[aot]'")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    with _no_noise():
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.libtpu or "", num_slices=topology.slices
        )
    return make_mesh(config.mesh, found.devices)


def has_libtpu() -> bool:
    """Whether libtpu (the extra `aot`) is installed."""
    return importlib.util.find_spec("libtpu") is not None


def for_accelerator(config: RunConfig) -> RunConfig:
    """The config as an accelerator would run it: this process's own platform must not decide what `auto` means."""
    if config.compute.dtype != "auto":
        return config
    return config.model_copy(update={"compute": config.compute.model_copy(update={"dtype": "bfloat16"})})


def compile_step(config: RunConfig, mesh: jax.sharding.Mesh | None, limit: float) -> Compiled:
    """Lower and compile the training step with shapes in place of arrays.

    Raises:
        UserError: a stage whose step cannot be compiled without data.
    """
    step, state, batch = _step(config, mesh)
    start = time.perf_counter()
    own = {"parameters": local_bytes(state.params), "optimizer": local_bytes(state.optimizer)}
    try:
        with _no_noise(), jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            compiled = step.lower(state, None, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        too_much, limit = _exceeded(str(error), limit)
        peak = limit + too_much
        rest = peak - sum(own.values())
        return Compiled(Memory(**own, temporaries=rest, code=0, peak=peak, limit=limit, too_much=too_much), "", seconds)
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    code = stats.generated_code_size_in_bytes
    arguments = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = getattr(stats, "peak_memory_in_bytes", 0) or arguments + stats.temp_size_in_bytes
    rest = peak - sum(own.values())
    return Compiled(
        Memory(**own, temporaries=rest, code=code, peak=peak, limit=limit, too_much=max(0.0, peak + code - limit)),
        compiled.as_text(),
        seconds,
    )


def _step(config: RunConfig, mesh: jax.sharding.Mesh | None) -> tuple[Any, TrainState, Any]:
    """The jitted step and its abstract arguments, placed."""
    if config.stage not in OBJECTIVES or config.stage == "dpo":
        raise UserError(f"plan compiles pretrain and sft runs, not {config.stage}")
    model = abstract_model(config.model, config.compute)
    graphdef, _ = nnx.split(model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = abstract_state(nnx.to_pure_dict(nnx.state(model)), optimizer, param_shardings(model, mesh))

    def merge(params: Any, frozen: Any) -> Mixtral:
        return nnx.merge(graphdef, params)

    shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(OBJECTIVES[config.stage](config), optimizer, merge, shardings)
    shape = (config.accumulation, config.rows_per_micro_batch, config.seq_len)
    place = batch_sharding(mesh)
    integers: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    weights: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    return step, state, Batch(integers, integers, weights, integers, integers)


def local_bytes(tree: Any) -> float:
    """Bytes of one device's shards of a tree of placed ShapeDtypeStructs."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _exceeded(message: str, limit: float) -> tuple[float, float]:
    """(bytes too many, the limit) from the compiler's sentence, of which there are two forms."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for sentence in (
        r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])",
        r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
    ):
        if found := re.search(sentence, message):
            used, most = float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]
            return used - most, most
    return 1.0, limit


@contextlib.contextmanager
def _no_noise() -> Iterator[None]:
    """libtpu complains on stderr that this is no TPU machine; shown only where something else goes wrong."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
