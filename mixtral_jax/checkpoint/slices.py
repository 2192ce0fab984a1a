"""Arrays of an Orbax checkpoint by slices, in and out, without ever holding one whole array.

Orbax writes its metadata around arrays of one element; the arrays themselves (zarr3 in OCDBT) are then written by
tensorstore, chunk by chunk, in any order. Orbax and tensorstore are imported by checkpoint/ alone.
"""

import math
import mmap
import shutil
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from mixtral_jax.checkpoint import trees as checkpoint
from mixtral_jax.dtypes import WEIGHTS

Box = tuple[int | slice, ...]
_COPIES = 2  # threads that tensorstore itself may use for copies


class ArraySpec(NamedTuple):
    """An array on disk: `chunk` is the shape of the pieces in which it is stored, each written whole."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


class ArrayReader:
    """The arrays under `path`/state by dotted name.

    Raises:
        ValueError: the directory is no checkpoint of ours, or an incomplete one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        problem = checkpoint.damage(path)
        if problem is not None or not (path / checkpoint.STATE / "manifest.ocdbt").is_file():
            what = problem or f"{checkpoint.STATE}/manifest.ocdbt is missing"
            raise ValueError(f"{path} is no complete Orbax checkpoint: {what}")
        self._arrays: dict[str, ts.TensorStore] = {}
        self.keep(0)
        self._base = {"driver": "file", "path": f"{(path / checkpoint.STATE).resolve()}/"}
        store = ts.KvStore.open({"driver": "ocdbt", "base": self._base}, context=self._context).result()
        keys = [key.decode() for key in store.list().result()]
        self.names = [key.removesuffix("/zarr.json") for key in keys if key.endswith("/zarr.json")]
        self._chunks = Counter(key.split("/c/")[0] for key in keys if "/c/" in key)
        found = checkpoint.stored_format(path)
        if found != checkpoint.FORMAT:
            raise ValueError(
                f"{path} is an Orbax checkpoint but not one of ours: format {checkpoint.FORMAT} expected, {found} found"
            )

    def keep(self, size: int) -> None:
        """Keep pieces of up to `size` bytes together, those that were read last, since more will be cut out of them."""
        pool = {"total_bytes_limit": size}
        self._context = ts.Context({"cache_pool": pool, "data_copy_concurrency": {"limit": _COPIES}})
        self._arrays.clear()

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": self._base, "path": f"{name}/"}}
            spec["recheck_cached_data"] = "open"
            self._arrays[name] = ts.open(spec, read=True, open=True, context=self._context).result()
        return self._arrays[name]

    def spec(self, name: str) -> ArraySpec:
        """Shape, dtype and chunks of one array; reads no data.

        Raises:
            ValueError: some of its chunks were never written, or it is no floating array.
        """
        array = self._array(name)
        layout = array.chunk_layout
        grid, chunk = layout.write_chunk.shape, layout.read_chunk.shape
        assert grid is not None and chunk is not None  # zarr3 arrays are always on a grid
        whole = math.prod(-(-n // int(c or n)) for n, c in zip(array.shape, grid, strict=True))
        if self._chunks[name] != whole:
            raise ValueError(f"{self.path} is incomplete: {name} has {self._chunks[name]} of {whole} chunks")
        dtype = array.dtype.name
        if dtype not in WEIGHTS:
            raise ValueError(f"{name} in {self.path} is {dtype}: only {', '.join(WEIGHTS)} are converted")
        return ArraySpec(
            tuple(array.shape), WEIGHTS[dtype], tuple(int(c or n) for n, c in zip(array.shape, chunk, strict=True))
        )

    def read(self, name: str, box: Box) -> np.ndarray:
        """The elements that `box` selects."""
        return self._array(name)[box].read().result()


class ArrayWriter:
    """A new checkpoint at `path` (it must not exist) with these arrays, whose chunks are then written in any order.

    A chunk that comes in parts is held until it is whole.
    """

    def __init__(self, path: Path, arrays: Mapping[str, ArraySpec]) -> None:
        self.path = path
        skeleton = {name: np.zeros((1,) * len(spec.shape), spec.dtype) for name, spec in arrays.items()}
        checkpoint.save(path, unflatten_dict(skeleton, sep="."))
        state = path / checkpoint.STATE
        for entry in ("d", "ocdbt.process_0", "array_metadatas"):
            shutil.rmtree(state / entry, ignore_errors=True)
        for file in (state / "manifest.ocdbt", path / checkpoint.FILES):
            file.unlink(missing_ok=True)
        # The whole directory is synchronised once, before it gets its name: a sync for every chunk would cost time.
        context = ts.Context({"data_copy_concurrency": {"limit": _COPIES}, "file_io_sync": False})
        base = {"driver": "file", "path": f"{state.resolve()}/"}
        opened = {
            name: ts.open(_zarr(base, name, spec), create=True, open=True, context=context)
            for name, spec in arrays.items()
        }
        self._arrays = {name: array.result() for name, array in opened.items()}
        self._specs, self._parts, self._lock = arrays, dict[Any, tuple[np.ndarray, list[int]]](), threading.Lock()

    def write(self, name: str, box: Box, values: np.ndarray) -> None:
        """Take a part of one chunk, or all of it; wait until what is whole is on disk."""
        spec = self._specs[name]
        edges = [(i, i + 1) if isinstance(i, int) else i.indices(n)[:2] for i, n in zip(box, spec.shape, strict=True)]
        start = [a // c * c for (a, _), c in zip(edges, spec.chunk, strict=True)]
        whole = tuple(slice(a, min(a + c, n)) for a, c, n in zip(start, spec.chunk, spec.shape, strict=True))
        lengths = [s.stop - s.start for s in whole]
        if values.size < math.prod(lengths):
            inside = tuple(slice(i - a, j - a) for (i, j), a in zip(edges, start, strict=True))
            with self._lock:
                if (name, *start) not in self._parts:
                    self._parts[name, *start] = (_mapped(lengths, spec.dtype), [])
                chunk, parts = self._parts[name, *start]
            chunk[inside] = values.reshape([j - i for i, j in edges])
            with self._lock:
                parts.append(values.size)
                if sum(parts) < chunk.size:
                    return
                del self._parts[name, *start]
            box, values = whole, chunk
        self._arrays[name][box].write(values, can_reference_source_data_indefinitely=True).result()

    def close(self) -> None:
        """All chunks are written.

        Raises:
            ValueError: of some only a part has come.
        """
        if self._parts:
            raise ValueError(
                f"{self.path}: {len(self._parts)} chunks are incomplete, such as one of {next(iter(self._parts))[0]}"
            )
        checkpoint.list_files(self.path)


def _mapped(lengths: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that goes back to the system at once: the allocator keeps freed chunks in an arena for each thread."""
    return np.frombuffer(mmap.mmap(-1, math.prod(lengths) * dtype.itemsize), dtype).reshape(lengths)


def _zarr(base: dict[str, str], name: str, spec: ArraySpec) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
        "metadata": {
            "shape": list(spec.shape),
            "data_type": spec.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunk)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "store_data_equal_to_fill_value": True,
    }
