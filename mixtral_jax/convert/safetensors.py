"""The safetensors format by its bytes: 8 bytes header length, JSON header, then the tensors one after another.

The library holds a whole file in memory when it writes and maps it when it reads; a stream must do neither.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from mixtral_jax.convert.files import Directory, LocalReader, RemoteReader

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Dtypes that appear in checkpoints and that are refused by name; their sizes let the file be checked all the same.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """One tensor of one file: `offset` counts from the start of the file."""

    name: str
    file: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        """Raises: ValueError for a dtype that is not bf16, fp16 or fp32."""
        if self.code not in DTYPES:
            raise ValueError(f"{self.name} in {self.file} is {self.code}: only BF16, F16 and F32 are converted")
        return DTYPES[self.code]


def read_header(directory: Directory, file: str, reader: LocalReader | RemoteReader) -> dict[str, Tensor]:
    """The tensors of one file by name.

    Raises:
        ValueError: the file is no safetensors file, or shorter or longer than its header says.
    """
    if reader.size < 8:
        raise ValueError(f"{directory}/{file} is truncated: {reader.size} bytes are no safetensors file")
    length = int.from_bytes(reader.pread(0, 8), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"{directory}/{file} is no safetensors file: its header would have {length:,} bytes")
    if 8 + length > reader.size:
        raise ValueError(f"{directory}/{file} is truncated: {reader.size:,} bytes, and the header alone has {length:,}")
    try:
        header = json.loads(bytes(reader.pread(8, length)))
        header.pop("__metadata__", None)
        tensors = {name: _tensor(name, file, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory}/{file} is no safetensors file: its header does not parse ({error})") from None
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if end != reader.size:
        what = "truncated" if end > reader.size else "longer than its header says"
        raise ValueError(f"{directory}/{file} is {what}: {reader.size:,} bytes on disk, {end:,} by its header")
    return tensors


def _tensor(name: str, file: str, entry: dict, base: int) -> Tensor:
    start, stop = entry["data_offsets"]
    tensor = Tensor(name, file, entry["dtype"], tuple(entry["shape"]), base + start, stop - start)
    if tensor.code in DTYPES and math.prod(tensor.shape) * tensor.dtype.itemsize != tensor.nbytes:
        raise ValueError(f"{name} has shape {list(tensor.shape)} of {tensor.code} but {tensor.nbytes:,} bytes")
    return tensor


def layout(file: str, tensors: list[tuple[str, np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, Tensor]]:
    """The first bytes of a file of these tensors in this order, and where each tensor goes after them."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    places = {name: _tensor(name, file, entries[name], 8 + len(header)) for name, _, _ in tensors}
    return len(header).to_bytes(8, "little") + header, places
