"""Hugging Face directories out: shards as the hub names them, each tensor's bytes at a place known beforehand."""

import json
import os
import re
from contextlib import ExitStack
from typing import Any

import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import Directory
from mixtral_jax.convert.hf import INDEX, SINGLE
from mixtral_jax.convert.safetensors_io import Tensor, layout
from mixtral_jax.convert.stream import Rows
from mixtral_jax.convert.table import Slot

Entry = tuple[str, np.dtype, tuple[int, ...]]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class HfSink:
    """The weights of a new Hugging Face directory.

    On this machine the pieces may come in any order; a remote file is written front to back, so there they must come
    in the order of `slots`, one after another.
    """

    def __init__(self, directory: Directory, entries: list[tuple[Slot, np.dtype]], max_shard_bytes: int) -> None:
        self.directory = directory
        self.slots = [slot for slot, _ in entries]
        self.total_size = sum(_nbytes((s.name, d, s.shape)) for s, d in entries)
        shards = split([(s.name, d, s.shape) for s, d in entries], max_shard_bytes)
        self._headers: dict[str, bytes] = {}
        self._tensors: dict[str, Tensor] = {}
        for number, shard in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._headers[file], tensors = layout(file, shard)
            self._tensors |= tensors
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        if not directory.remote:
            for file in self._headers:
                self._start(file)

    def put(self, slot: Slot, start: int, stop: int, rows: Rows) -> None:
        block = rows(start, stop)
        tensor = self._tensors[slot.name]
        data = np.ascontiguousarray(block).view(np.uint8).data.cast("B")
        if self.directory.remote:
            if tensor.file not in self._open:
                self._stack.close()
                self._start(tensor.file)
            self._open[tensor.file].write(data)
            return
        offset, file = tensor.offset + start * slot.cols * tensor.dtype.itemsize, self._open[tensor.file].fileno()
        while data:
            done = os.pwrite(file, data[: 1 << 30], offset)
            data, offset = data[done:], offset + done

    def close(self) -> None:
        """Finish the files and write the index, if there is more than one."""
        self._stack.close()
        if len(self._headers) > 1:
            index = {
                "metadata": {"total_size": self.total_size},
                "weight_map": {name: tensor.file for name, tensor in sorted(self._tensors.items())},
            }
            self.directory.write_bytes(INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def abort(self) -> None:
        """Close what is open; the files are not whole."""
        self._stack.close()

    def _start(self, file: str) -> None:
        self._open[file] = self._stack.enter_context(self.directory.create(file))
        self._open[file].write(self._headers[file])
        if not self.directory.remote:
            self._open[file].flush()


def split(tensors: list[Entry], max_bytes: int) -> list[list[Entry]]:
    """Shards of at most `max_bytes`, filled in order as huggingface_hub fills them; a larger tensor is alone in one."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for tensor in tensors:
        own = _nbytes(tensor)
        if shards[-1] and size + own > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += own
    return shards


def _nbytes(entry: Entry) -> int:
    _, dtype, shape = entry
    return int(np.prod(shape)) * dtype.itemsize


def parse_size(text: str | int) -> int:
    """ "5GB" as bytes; units are decimal as on the hub, KiB, MiB and GiB are binary.

    Raises:
        ValueError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size {text!r} is no size: write it as 5GB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def export_config(hf_config: dict[str, Any], config: MixtralConfig, dtype: str) -> dict[str, Any]:
    """config.json of an export: what came with the model, its shape and dtype, in words of transformers 4 and 5."""
    shape = config.to_hf(dtype)
    fixed = {
        k: shape[k] for k in ("architectures", "model_type", "dtype", "torch_dtype", "rope_theta", "rope_parameters")
    }
    fixed |= {k: getattr(config, k) for k in MixtralConfig.model_fields if k in shape}
    return {**shape, **hf_config, **fixed}
