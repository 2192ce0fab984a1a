"""Safetensors files as slots, in and out: 8 bytes header length, JSON header, then the tensors one after another.

The library holds a whole file in memory when it writes and maps it when it reads; a stream must do neither.
Format: https://github.com/huggingface/safetensors#format
"""

import functools
import json
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import Directory, File
from mixtral_jax.convert.stream import DtypeOf, ReadRows, Source
from mixtral_jax.convert.table import Place, Slot, check_arrays, count_slots
from mixtral_jax.dtypes import SAFETENSORS

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER = 100_000_000
_CODES = {dtype: code for code, dtype in SAFETENSORS.items()}
Entry = tuple[str, np.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Tensor:
    """One tensor of one file: `offset` counts from the start of the file."""

    name: str
    file: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    content: File

    @property
    def dtype(self) -> np.dtype:
        """Raises: ValueError for a dtype that is not bf16, fp16 or fp32."""
        if self.code not in SAFETENSORS:
            raise ValueError(f"{self.name} in {self.file} is {self.code}: only BF16, F16 and F32 are converted")
        return SAFETENSORS[self.code]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start ... stop - 1 of the matrix whose columns are the last axis; elements of a vector."""
        tail = self.shape[1:][-1:]
        width = math.prod(tail) * self.dtype.itemsize
        data = self.content.pread(self.offset + start * width, (stop - start) * width)
        return np.frombuffer(data, self.dtype).reshape(stop - start, *tail)


def read_tensors(directory: Directory, files: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of all files by name; none of their bytes are read.

    Raises:
        ValueError: a file is no safetensors file, or shorter or longer than its header says; a tensor is in two files.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _read_header(directory, file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(f"{twice[0]} is both in {tensors[twice[0]].file} and in {file} of {directory}")
        tensors |= found
    return tensors


def _read_header(directory: Directory, name: str) -> dict[str, Tensor]:
    file, where = directory.file(name), f"{directory}/{name}"
    if file.size < 8:
        raise ValueError(f"{where} is truncated: {file.size} bytes are no safetensors file")
    length = int.from_bytes(file.pread(0, 8), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"{where} is no safetensors file: its header would have {length:,} bytes")
    if 8 + length > file.size:
        raise ValueError(f"{where} is truncated: {file.size:,} bytes, and the header alone has {length:,}")
    try:
        header = json.loads(bytes(file.pread(8, length)))
        header.pop("__metadata__", None)
        tensors = {own: _tensor(own, name, entry, 8 + length, file) for own, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} is no safetensors file: its header does not parse ({error})") from None
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if end != file.size:
        what = "truncated" if end > file.size else "longer than its header says"
        raise ValueError(f"{where} is {what}: {file.size:,} bytes on disk, {end:,} by its header")
    return tensors


def _tensor(name: str, file: str, entry: dict, base: int, content: File) -> Tensor:
    start, stop = entry["data_offsets"]
    tensor = Tensor(name, file, entry["dtype"], tuple(entry["shape"]), base + start, stop - start, content)
    if tensor.code in SAFETENSORS and math.prod(tensor.shape) * tensor.dtype.itemsize != tensor.nbytes:
        raise ValueError(f"{name} has shape {list(tensor.shape)} of {tensor.code} but {tensor.nbytes:,} bytes")
    return tensor


class TensorSource(Source):
    """Slots out of safetensors files, each from its place. Subclasses find the files, the shape and the places."""

    def __init__(
        self, directory: Directory, hf_config: dict[str, Any], config: MixtralConfig, tensors: dict[str, Tensor]
    ) -> None:
        self.directory, self.hf_config, self.config, self.tensors = directory, hf_config, config, tensors
        rows = sum(tensor.shape[0] for tensor in tensors.values() if tensor.shape)
        if (asked := count_slots(config)) > max(rows, 200_000):  # before they are made; each is a row at the least
            raise ValueError(
                f"{directory} is no model of {config.num_hidden_layers} layers and {config.num_local_experts} experts, "
                f"as its configuration says: that is {asked:,} matrices, and its files hold {len(tensors):,} tensors"
            )
        self.slots: list[Slot] = []
        self.places: dict[str, Place] = {}
        # Where the columns of several slots lie side by side, each is cut out of the same rows.
        self._kept_rows = functools.lru_cache(maxsize=4)(lambda name, start, stop: tensors[name].rows(start, stop))

    def fused(self, together: str, apart: str) -> bool:
        """Whether the experts of a layer are in one tensor, by what is in its name then and else."""
        one, other = (next((name for name in self.tensors if part in name), None) for part in (together, apart))
        if one and other:
            raise ValueError(f"two expert layouts are mixed: {one} (fused) and {other} (one tensor an expert)")
        return one is not None

    def put_in_place(
        self,
        places: dict[Slot, Place],
        described: str = "its config.json",
        ask: str = "config.json asks for {}",
    ) -> None:
        """These slots; every tensor must be there in its shape and in a dtype that is read: see check_arrays."""
        self.slots, self.places = list(places), {slot.name: place for slot, place in places.items()}
        expected = {where.name: where.shape for where in places.values()}
        found = {name: (tensor.shape, f"{self.directory}/{tensor.file}") for name, tensor in self.tensors.items()}
        check_arrays(expected, found, str(self.directory), described, ask)
        for slot in self.slots:
            self.dtype(slot)

    def dtype(self, slot: Slot) -> np.dtype:
        return self.tensors[self.places[slot.name].name].dtype

    def band(self, slot: Slot) -> int | None:
        """Whole tensors where rows of the hub's matrix are no rows on disk."""
        return None if self.places[slot.name].plain else slot.rows

    def cost(self, slot: Slot) -> int:
        """Where columns are cut out of rows, the whole rows are held too."""
        where = self.places[slot.name]
        rows = 0 if where.columns is None else slot.rows * math.prod(where.shape[1:])
        return super().cost(slot) + rows * self.dtype(slot).itemsize

    def side_files(self) -> Directory | None:
        return self.directory

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        where = self.places[slot.name]
        first, tensor = where.first_row, self.tensors[where.name]
        if where.flipped:
            return tensor.rows(first, first + slot.cols)[:, start:stop].T
        if where.columns is not None:
            return self._kept_rows(where.name, first + start, first + stop)[:, where.columns]
        block = tensor.rows(first + start, first + stop)
        if not where.interleaved_heads:
            return block
        size = slot.rows // where.interleaved_heads
        assert start % size == 0 and stop % size == 0  # band() asks for whole tensors
        return block.reshape(-1, size // 2, 2, slot.cols).swapaxes(1, 2).reshape(stop - start, slot.cols)


class TensorSink:
    """The safetensors files of a new directory: one called `single`, or shards of at most `max_bytes` and an index.

    On this machine the pieces may come in any order; a remote file is written front to back, so there they must come
    in the order of `slots`, one after another.
    """

    def __init__(
        self,
        directory: Directory,
        source: Source,
        dtype_of: DtypeOf,
        *,
        max_bytes: float = math.inf,
        single: str = SINGLE,
    ) -> None:
        # Larger items first: every tensor then starts at a multiple of its item size.
        self.directory, self.slots = directory, sorted(source.slots, key=lambda slot: -dtype_of(slot).itemsize)
        tensors = [(slot.name, dtype_of(slot), slot.shape) for slot in self.slots]
        self._total_size, shards = sum(map(_nbytes, tensors)), split(tensors, max_bytes)
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for number, shard in enumerate(shards, 1):
            file = single if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._headers[file], offsets = layout(shard)
            self._places |= {name: (file, offset) for name, offset in offsets.items()}
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for file in () if self.directory.remote else self._headers:
            self._start(file).flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the files and write the index, if there is more than one."""
        self._stack.close()
        if kind is None and len(self._headers) > 1:
            files = {name: file for name, (file, _) in sorted(self._places.items())}
            self.directory.write_json(INDEX, {"metadata": {"total_size": self._total_size}, "weight_map": files})

    def put(self, slot: Slot, start: int, stop: int, rows: ReadRows) -> None:
        block = np.ascontiguousarray(rows(start, stop))
        data = block.view(np.uint8).data.cast("B")
        file, offset = self._places[slot.name]
        if self.directory.remote:
            if file not in self._open:
                self._stack.close()
                self._start(file)
            self._open[file].write(data)
            return
        offset += start * slot.cols * block.itemsize
        while data:
            done = os.pwrite(self._open[file].fileno(), data[: 1 << 30], offset)
            data, offset = data[done:], offset + done

    def _start(self, file: str) -> Any:
        opened = self._open[file] = self._stack.enter_context(self.directory.create(file))
        opened.write(self._headers[file])
        return opened


def layout(tensors: list[Entry]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file of these tensors in this order, and the offset of each tensor in the file."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in tensors:
        name, dtype, shape = entry
        start, end = end, end + _nbytes(entry)
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    offsets = {name: 8 + len(header) + entries[name]["data_offsets"][0] for name, _, _ in tensors}
    return len(header).to_bytes(8, "little") + header, offsets


def split(tensors: list[Entry], max_bytes: float) -> list[list[Entry]]:
    """Shards of at most `max_bytes`, filled in order as huggingface_hub fills them; a larger tensor is alone in one."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + _nbytes(tensor) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _nbytes(tensor)
    return shards


def _nbytes(entry: Entry) -> int:
    _, dtype, shape = entry
    return math.prod(shape) * dtype.itemsize
