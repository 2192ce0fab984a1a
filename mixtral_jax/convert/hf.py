"""Hugging Face directories, in and out: layouts, wholeness, and shards whose every byte has a known place."""

import json
import os
import re
from contextlib import ExitStack
from typing import Any

import numpy as np
from pydantic import ValidationError

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import Directory, LocalReader, RemoteReader
from mixtral_jax.convert.safetensors import Tensor, layout, read_header
from mixtral_jax.convert.stream import Rows
from mixtral_jax.convert.table import Layout, Place, Slot, slots

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # a buffer that old files carry; it follows from rope_theta
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class HfSource:
    """A Hugging Face directory as slots. All checks are made here, before anything is written.

    Raises:
        ValueError: no config.json, another architecture, files missing or truncated, tensors missing, unexpected,
            of a wrong shape or dtype, or two layouts mixed.
    """

    def __init__(self, path: str | os.PathLike[str], architectures: tuple[str, ...] = ("mixtral", "mistral")) -> None:
        self.directory = Directory(path)
        self.hf_config = self._read_config()
        self.config = read_shape(self.hf_config, self.directory, architectures)
        self._readers: dict[str, LocalReader | RemoteReader] = {}
        self._tensors = self._scan()
        self.slots = slots(self.config)
        self.layout = self._layout_of()
        self._places = {slot.name: self._place(slot) for slot in self.slots}
        self._check()

    def dtype(self, slot: Slot) -> np.dtype:
        return self._tensors[self._places[slot.name].name].dtype

    def band(self, slot: Slot) -> int | None:
        """Rows that it is best to read at once; None: any number."""
        return None

    def cost(self, slot: Slot) -> int:
        """Bytes that reading holds: a few rows at a time."""
        return 1 << 20

    def read(self, slot: Slot, start: int, stop: int) -> np.ndarray:
        """Hub rows start ... stop - 1 of a slot, as (rows, cols) or (rows,)."""
        where = self._places[slot.name]
        return self.read_rows(where.name, where.first_row + start, where.first_row + stop, slot.shape[1:])

    def read_rows(self, name: str, start: int, stop: int, tail: tuple[int, ...]) -> np.ndarray:
        """Rows of a tensor seen as a matrix with rows of shape `tail`."""
        tensor = self._tensors[name]
        width = int(np.prod(tail)) * tensor.dtype.itemsize
        data = self._readers[tensor.file].pread(tensor.offset + start * width, (stop - start) * width)
        return np.frombuffer(data, tensor.dtype).reshape(stop - start, *tail)

    def _read_config(self) -> dict[str, Any]:
        return read_config(self.directory)

    def _files(self) -> tuple[list[str], dict[str, str]]:
        return weight_files(self.directory)

    def _layout_of(self) -> Layout:
        fused = next((n for n in self._tensors if ".mlp.experts." in n), None)
        hub = next((n for n in self._tensors if ".block_sparse_moe.experts." in n), None)
        if fused and hub:
            raise ValueError(f"two expert layouts are mixed: {fused} (fused) and {hub} (one tensor an expert)")
        return "fused" if fused else "hub"

    def _place(self, slot: Slot) -> Place:
        return place(slot, self.config, self.layout)

    def _scan(self) -> dict[str, Tensor]:
        files, index = self._files()
        tensors: dict[str, Tensor] = {}
        for file in files:
            self._readers[file] = self.directory.reader(file)
            found = read_header(self.directory, file, self._readers[file])
            twice = sorted(tensors.keys() & found.keys())
            if twice:
                raise ValueError(f"{twice[0]} is both in {tensors[twice[0]].file} and in {file} of {self.directory}")
            tensors |= found
        for name, file in index.items():
            if name not in tensors:
                raise ValueError(f"{self.directory}/{INDEX} places {name} in {file}, which does not hold it")
        return {name: t for name, t in tensors.items() if not _IGNORED.fullmatch(name)}

    def _check(self) -> None:
        places = self._places.values()
        expected = {p.name: p.shape for p in places}
        if self.config.tie_word_embeddings and "lm_head.weight" in self._tensors:
            expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
        missing = [name for name in expected if name not in self._tensors]
        unexpected = [name for name in self._tensors if name not in expected]
        if missing or unexpected:
            raise ValueError(slot_error(str(self.directory), missing, unexpected))
        for name, shape in expected.items():
            tensor = self._tensors[name]
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} in {self.directory}/{tensor.file} has shape {list(tensor.shape)}, "
                    f"config.json asks for {list(shape)}"
                )
            assert tensor.dtype
        if self.config.tie_word_embeddings and "lm_head.weight" in self._tensors:
            self._check_tied()

    def _check_tied(self) -> None:
        """A tied model may carry its head a second time; then it must be the embedding."""
        rows, cols = self._tensors["lm_head.weight"].shape
        for start in range(0, rows, 4096):
            stop = min(start + 4096, rows)
            both = [self.read_rows(n, start, stop, (cols,)) for n in ("lm_head.weight", "model.embed_tokens.weight")]
            if both[0].tobytes() != both[1].tobytes():
                raise ValueError(
                    f"config.json of {self.directory} ties the embeddings, but lm_head.weight differs from "
                    "model.embed_tokens.weight: set tie_word_embeddings to false"
                )


def read_config(directory: Directory) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    names = directory.names()
    if not names and not directory.exists():
        raise FileNotFoundError(f"{directory} does not exist")
    if "config.json" not in names:
        raise ValueError(f"{directory} has no config.json: it is no model directory")
    try:
        config = json.loads(directory.read_bytes("config.json"))
    except ValueError as error:
        raise ValueError(f"{directory}/config.json is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{directory}/config.json holds no JSON object")
    return config


def read_shape(
    hf_config: dict[str, Any], where: Directory, architectures: tuple[str, ...] = ("mixtral", "mistral")
) -> MixtralConfig:
    """The shape that a config.json describes.

    Raises:
        ValueError: another architecture, an unsupported variant, or a value that makes no sense; one sentence.
    """
    try:
        return MixtralConfig.from_hf(hf_config, architectures)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())
        raise ValueError(f"config.json of {where} does not describe a model: {told}") from None


def weight_files(directory: Directory) -> tuple[list[str], dict[str, str]]:
    """The safetensors files of a directory, and the index (empty for a single file).

    Raises:
        ValueError: there are none, a shard is missing on disk or in the index, or the weights are pickles.
    """
    names = directory.names()
    shards = [n for n in names if _SHARD.fullmatch(n)]
    if INDEX in names:
        try:
            index = dict(json.loads(directory.read_bytes(INDEX))["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{directory}/{INDEX} does not parse: a JSON object with weight_map was expected"
            ) from None
        files = sorted(set(index.values()))
        absent = [f for f in files if f not in names]
        if absent:
            raise ValueError(f"{directory} lacks {', '.join(absent)}, which {INDEX} names")
        strays = [s for s in shards if s not in files]
        if strays:
            raise ValueError(f"{directory}/{INDEX} does not name {', '.join(strays)}, which is there")
        return files, index
    if SINGLE in names:
        return [SINGLE], {}
    if shards:
        raise ValueError(f"{directory} has {len(shards)} shards ({shards[0]} ...) but no {INDEX}")
    pickles = [n for n in names if n.endswith(_PICKLES)]
    if pickles:
        raise ValueError(
            f"{directory} holds pickled weights ({pickles[0]}), which are not read: save it as safetensors"
        )
    raise ValueError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX}")


def place(slot: Slot, config: MixtralConfig, layout: Layout) -> Place:
    """Where the hub's or the fused layout keeps a slot."""
    if layout == "hub" or not slot.leaf.path.startswith("layers.moe."):
        return Place(slot.name, slot.shape)
    prefix = f"model.layers.{slot.layer}.mlp."
    E, F, D = config.num_local_experts, config.intermediate_size, config.hidden_size
    if slot.leaf.path == "layers.moe.w13":  # w1 of an expert, then its w3
        first = (2 * slot.expert + slot.half) * F
        return Place(prefix + "experts.gate_up_proj", (E, 2 * F, D), first)
    if slot.leaf.path == "layers.moe.w2":
        return Place(prefix + "experts.down_proj", (E, D, F), slot.expert * D)
    return Place(prefix + "gate.weight", slot.shape)


def slot_error(where: str, missing: list[str], unexpected: list[str]) -> str:
    """Both lists, shortened."""

    def listed(names: list[str]) -> str:
        shown = ", ".join(names[:8]) + (f", ... ({len(names) - 8} more)" if len(names) > 8 else "")
        return f"{len(names)}" + (f" ({shown})" if names else "")

    return f"{where} does not match its config.json: missing tensors {listed(missing)}; unexpected {listed(unexpected)}"


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
