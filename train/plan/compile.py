"""Ahead-of-time compilation of the very step that a run would take, for devices that need not be there."""

import contextlib
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mixtral_jax.data.rows import Batch, PairBatch
from mixtral_jax.lora import is_adapter
from mixtral_jax.parallel import MESH_AXES, batch_sharding, device_grid, make_mesh
from mixtral_jax.train.config import DpoStageConfig, RunConfig
from mixtral_jax.train.objectives import OBJECTIVES
from mixtral_jax.train.optimizer import make_optimizer
from mixtral_jax.train.plan import gpus
from mixtral_jax.train.plan.chips import NODE_GPUS, Topology
from mixtral_jax.train.plan.placement import Memory, asks_reference, copies_reference
from mixtral_jax.train.preference import make_sequence_logps
from mixtral_jax.train.state import TrainState, abstract_state
from mixtral_jax.train.step import make_train_step
from mixtral_jax.train.weights import abstract_params, is_trained, keep, make_base_merge, make_merge

UNKNOWN_STEPS = 1_000_000  # of a run by data.epochs, whose length its data tell: no program is larger or slower for it


def plan_mesh(config: RunConfig, topology: Topology) -> jax.sharding.Mesh | None:
    """The mesh of the run on a machine that is not there, or on this one's devices.

    Raises:
        ValueError: the mesh does not fit the number of devices.
    """
    if topology.machine.platform == "cpu":
        return make_mesh(config.mesh)
    if topology.is_gpu:
        nodes = math.ceil(topology.chips / NODE_GPUS)
        found = gpus.devices(topology.chip.name, nodes, topology.chips // nodes)
    else:
        from jax.experimental import topologies

        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        with _no_noise():
            # libtpu takes hosts of 2x2 chips, where it is not told that there is one chip
            bounds = {"chips_per_host_bounds": [1, 1, 1]} if topology.chips_per_slice == 1 else {}
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=topology.libtpu or "", num_slices=topology.slices, **bounds
            ).devices
    # one device that is not there is a mesh too, or the step would be compiled for this machine
    return make_mesh(config.mesh, found) or jax.sharding.Mesh(device_grid(config.mesh, found), MESH_AXES)


def missing_compiler(topology: Topology) -> str | None:
    """What must be installed to compile for this machine; None where nothing is missing."""
    if topology.is_gpu:
        return None if gpus.has_cuda_plugin() else "jax's CUDA plugin is missing (pip install 'mixtral-jax[aot-gpu]')"
    return None if has_libtpu() else "libtpu is not installed (pip install 'mixtral-jax[aot]')"


def has_libtpu() -> bool:
    """Whether libtpu (the extra `aot`) is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compile_step(
    config: RunConfig, mesh: jax.sharding.Mesh | None, limit: float, gpu: str | None = None
) -> tuple[Memory, list[str]]:
    """Lower and compile the training step, and what asks a live reference, with shapes in place of arrays.

    `gpu`: which one the mesh has that is not there.

    Returns:
        What the compiler says of the memory, and the texts of the programs: none where the step does not fit.
    """
    step = _step(config, mesh)
    resident = {"parameters": step.state.params, "optimizer": step.state.optimizer, "frozen": step.frozen}
    own = {name: local_bytes(tree) for name, tree in resident.items()}
    own["reference"] = 0.0 if step.reference is step.frozen else local_bytes(step.reference)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_no_noise())
            if mesh is not None:
                stack.enter_context(jax.set_mesh(mesh))
            if gpu is not None:
                stack.enter_context(gpus.there(gpu))
            asked: list[tuple[Any, Any]] = [(step.train, (step.state, step.frozen, step.batch))]
            if step.ask is not None:
                asked.append((step.ask, (step.reference, step.batch)))
            platforms = None if gpu is None else ("cuda",)
            programs = [f.trace(*given).lower(lowering_platforms=platforms).compile() for f, given in asked]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        peak, limit = _exceeded(str(error), limit)
        return Memory(**own, code=0, peak=peak, limit=limit), []
    peaks = [_peak(p.memory_analysis()) for p in programs]
    # one runs after the other; each finds the other's arguments in its way
    peaks[0] += own["reference"]
    peaks[1:] = [p + sum(own.values()) - local_bytes(step.reference) for p in peaks[1:]]
    code = float(sum(p.memory_analysis().generated_code_size_in_bytes for p in programs))
    return Memory(**own, code=code, peak=max(peaks), limit=limit), [p.as_text() for p in programs]


def _peak(stats: Any) -> float:
    arguments = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return float(getattr(stats, "peak_memory_in_bytes", 0) or arguments + stats.temp_size_in_bytes)


class _Step(NamedTuple):
    """Jitted functions and their abstract arguments, placed."""

    train: Any  # (state, frozen, batch)
    state: TrainState
    frozen: Any
    batch: Any
    ask: Any  # (reference, batch), of a live reference; else None
    reference: Any  # `frozen` itself where a reference needs no copy


def _step(config: RunConfig, mesh: jax.sharding.Mesh | None) -> _Step:
    """What train/build.py makes for a run, of shapes."""
    weights, trained = abstract_params(config, mesh), is_trained(config)
    steps = config.steps or UNKNOWN_STEPS
    optimizer, shapes = make_optimizer(config.optimizer, steps, config.router_factor), keep(weights, trained)
    state = abstract_state(shapes, optimizer)
    frozen = None if config.adapters is None else keep(weights, lambda path: not trained(path))
    shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, state)
    seed = config.seed if config.noisy else None
    train = make_train_step(OBJECTIVES[config.stage](config), optimizer, make_merge(config), shardings, seed)
    batch, ask, reference = _batch(config, mesh), None, None
    if isinstance(config, DpoStageConfig) and asks_reference(config):
        ask = make_sequence_logps(make_base_merge(config), config.dpo.ld_alpha)
        reference = keep(weights, lambda path: not is_adapter(path)) if copies_reference(config) else frozen
    return _Step(train, state, frozen, batch, ask, reference)


def _batch(config: RunConfig, mesh: jax.sharding.Mesh | None) -> Batch | PairBatch:
    """Shapes of one optimizer step's rows, or of its rows of pairs."""
    by_token = batch_sharding(mesh)
    by_row = by_token and jax.sharding.NamedSharding(by_token.mesh, PartitionSpec(*by_token.spec[:2]))

    def array(dtype: Any, place: Any, *last: int) -> Any:
        rows = (config.accumulation, config.rows_per_micro_batch)
        return jax.ShapeDtypeStruct((*rows, *last), dtype, sharding=place)

    ids, pairs = array(jnp.int32, by_token, config.seq_len), config.data.pairs_per_row
    if config.stage != "dpo":
        return Batch(ids, ids, array(jnp.float32, by_token, config.seq_len), ids, ids)
    lengths, logps = (array(dtype, by_row, pairs, 2) for dtype in (jnp.int32, jnp.float32))
    return PairBatch(ids, ids, ids, ids, ids, lengths, array(jnp.float32, by_row, pairs), logps)


def local_bytes(tree: Any) -> float:
    """Bytes of one device's shards of a tree of placed ShapeDtypeStructs."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _exceeded(message: str, limit: float) -> tuple[float, float]:
    """(bytes used, the limit) from the compiler's sentence, of which there are two forms."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for sentence in (
        r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])",
        r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
    ):
        if found := re.search(sentence, message):
            return float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]
    return limit + 1, limit


@contextlib.contextmanager
def _no_noise() -> Iterator[None]:
    """Compilers complain on stderr that this is no such machine; shown only where something else goes wrong."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
