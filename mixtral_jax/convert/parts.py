"""Native leaves out of a source, by parts: what is stored is read once, whoever needs how much of it."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.convert.stream import NativeSource, Source, run
from mixtral_jax.convert.table import Leaf

Edges = tuple[tuple[int, int], ...]  # of a box: start and stop along each axis
At = tuple[int, ...]


def edges(index: Sequence[slice], shape: Sequence[int]) -> Edges:
    """The box that `index`, a slice for each axis, selects."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def read_parts(
    source: Source, leaf: Leaf, boxes: Sequence[Edges], take: Callable[[Edges, At, np.ndarray], None]
) -> None:
    """take(box, where in it, values), from several threads, until all `boxes` are covered.

    A part is at most what lies together on disk: a matrix of one layer and expert, or the piece that holds it.
    """
    own = {tuple(i for i in slot.box(0, 0) if isinstance(i, int)): slot for slot in source.slots if slot.leaf == leaf}

    def read(cell: Edges, parts: Mapping[Edges, Edges]) -> None:
        if isinstance(source, NativeSource):
            values = source.read_box(leaf.path, tuple(slice(*edge) for edge in cell))
        else:
            start, stop = (edge * leaf.row_step for edge in cell[leaf.rows_axis])
            slot = own[tuple(cell[axis][0] for axis in leaf.single)]
            values = slot.to_native(source.read(slot, start, stop)).reshape([b - a for a, b in cell])
        for box, part in parts.items():
            inside = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(part, cell, strict=True))
            take(box, tuple(a - c for (a, _), (c, _) in zip(part, box, strict=True)), values[inside])

    def widened(cell: Edges) -> Edges:
        """What has to be read of a hub tensor: whole rows."""
        keep = {*leaf.single, leaf.rows_axis}
        axes = enumerate(zip(cell, leaf.shape, strict=True))
        return tuple(edge if axis in keep else (0, n) for axis, (edge, n) in axes)

    first = next(iter(own.values()))
    grid, size = source.grid(first), source.dtype(first).itemsize
    together, native = int(np.prod(grid)), isinstance(source, NativeSource)
    tasks = []
    for cell, parts in _cells(leaf, grid, boxes):
        wide = widened(cell)
        held = int(np.prod([b - a for a, b in wide]))  # and a copy of it, in fp32 at the most
        tasks.append((partial(read, cell if native else wide, parts), (size + 4) * max(held, together * native)))
    run(tasks)


def _cells(leaf: Leaf, grid: At, boxes: Sequence[Edges]) -> Iterator[tuple[Edges, dict[Edges, Edges]]]:
    """What is read at once, and the part of it for each box: runs of `grid`, cut along the rows where a box ends."""
    cuts = []
    for axis, (n, step) in enumerate(zip(leaf.shape, grid, strict=True)):
        points = {0, n}
        if axis in leaf.single:
            points |= set(range(0, n, step))
        elif axis == leaf.rows_axis:
            points |= {min(n, -(-edge // step) * step) for box in boxes for edge in box[axis]}
        cuts.append(list(itertools.pairwise(sorted(points))))
    for cell in itertools.product(*cuts):
        parts = {box: _common(cell, box) for box in boxes}
        parts = {box: part for box, part in parts.items() if all(a < b for a, b in part)}
        if parts:
            axes = zip(*parts.values(), strict=True)
            yield tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in axes), parts


def _common(first: Edges, second: Edges) -> Edges:
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))


def place(
    source: Source,
    leaf: Leaf,
    boxes: Mapping[Any, Edges],
    outs: Sequence[Any],
    make: Callable[[np.ndarray, At], Sequence[tuple[Any, At]]],
) -> list[jax.Array]:
    """Arrays like `outs` (shape, dtype, sharding) made of a leaf part by part, each device's of its box of the leaf.

    A box that several devices share is made on the first of them and copied. The host holds the parts under way, at
    most BUDGET or one matrix, and where the devices are CPUs, whose memory is its own, one leaf.

    Args:
        boxes: for each of this process's devices; a single None is the default device, without a sharding.
        make: of a part of a box, and where in the box it is: for each out its values and where in the box's they are.
    """
    first = {box: device for device, box in reversed(list(boxes.items()))}
    with ThreadPoolExecutor(1) as own:  # a mesh in context, which is a thread's, would want buffers on all its devices
        made = own.submit(lambda: {box: [_empty(o, device) for o in outs] for box, device in first.items()}).result()
    lock = threading.Lock()

    def take(box: Edges, at: At, values: np.ndarray) -> None:
        for i, (value, where) in enumerate(make(values, at)):
            if isinstance(held := made[box][i], np.ndarray):
                held[tuple(slice(a, a + n) for a, n in zip(where, value.shape, strict=True))] = value
                continue
            with lock:
                made[box][i] = _put(made[box][i], value, where).block_until_ready()

    read_parts(source, leaf, list(first), take)
    arrays = []
    for i, out in enumerate(outs):
        parts = [jax.device_put(made[box][i], device) for device, box in boxes.items()]
        arrays.append(
            parts[0]
            if out.sharding is None
            else jax.make_array_from_single_device_arrays(out.shape, out.sharding, parts)
        )
    return arrays


def _empty(out: Any, device: jax.Device | None) -> Any:
    """A device's part of an array, to be filled: on the device, or where its memory is the host's in numpy."""
    shape = out.shape if out.sharding is None else out.sharding.shard_shape(out.shape)
    if _on_host(device):
        return np.empty(shape, out.dtype)
    there = device and jax.sharding.SingleDeviceSharding(device)
    return jax.jit(partial(jnp.zeros, shape, out.dtype), out_shardings=there)()


def _on_host(device: jax.Device | None) -> bool:
    return (device.platform if device else jax.default_backend()) == "cpu"


_put = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)
