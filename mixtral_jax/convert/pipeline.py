"""The conversions: open a source, check it, stream it into a new directory, put the small files beside it."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.atomic import check_destination, new_directory
from mixtral_jax.convert.files import Directory, is_remote
from mixtral_jax.convert.hf import HfSink, HfSource, export_config, parse_size
from mixtral_jax.convert.mistral import MistralSource, is_mistral
from mixtral_jax.convert.orbax import PARAMS, OrbaxSink, OrbaxSource, is_orbax, training_meta
from mixtral_jax.convert.progress import progress_bar
from mixtral_jax.convert.stream import Tally, copy
from mixtral_jax.convert.table import Slot

Path_ = str | os.PathLike[str]
AnySource = Any  # a stream.Source that also has .directory and .hf_config
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16), "bf16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16), "fp16": np.dtype(np.float16),
    "float32": np.dtype(np.float32), "fp32": np.dtype(np.float32),
}  # fmt: skip
SIDE_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3", "tekken.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def hf2orbax(src: Path_, dst: Path_, *, dtype: str | None = None, force: bool = False, progress: bool = True) -> None:
    """A Hugging Face directory (or Mistral's own layout) to an Orbax model directory.

    Args:
        dtype: bfloat16, float16 or float32; None keeps every tensor's own.
        force: replace `dst`, in one step, when the new directory is whole.

    Raises:
        ValueError: the source is not whole, not supported, or does not match its config.json; nothing is left at `dst`.
        FileExistsError: `dst` exists.
    """
    check_orbax_destination(dst)
    check_destination(dst, src, force)
    write_orbax(open_hf(src), dst, dtype=dtype, force=force, progress=progress)


def orbax2hf(
    src: Path_,
    dst: Path_,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    force: bool = False,
    progress: bool = True,
) -> None:
    """An Orbax model directory, or one step of a training run, to a Hugging Face directory.

    Args:
        dtype: None keeps each tensor's own, except for a training checkpoint (fp32): its config.json's, bfloat16.
        max_shard_size: as in save_pretrained.

    Raises:
        ValueError, FileExistsError: as hf2orbax.
    """
    shard_bytes = parse_size(max_shard_size)
    check_destination(dst, src, force)
    source = open_orbax(src)
    if dtype is None and source.training:
        dtype = source.hf_config["dtype"]
    write_hf(source, dst, dtype=dtype, shard_bytes=shard_bytes, force=force, progress=progress)


def write_orbax(source: AnySource, dst: Path_, *, dtype: str | None, force: bool, progress: bool) -> None:
    """Any source to an Orbax model directory."""
    dtype_of = _chooser(source, dtype)
    total = _bytes(source, dtype_of)
    with new_directory(dst, needed_bytes=total, force=force) as work:
        sink = OrbaxSink(work.local / PARAMS, source, dtype_of)
        with progress_bar(f"writing {dst}", total, show=progress) as advance:
            tally = copy(source, sink, dtype_of, advance)
        sink.close()
        _finish(source, work, dtype_of)
    _report(tally, dst, progress)


def write_alike(source: AnySource, inner: AnySource, dst: Path_, *, force: bool, progress: bool) -> None:
    """A changed source in the format and dtypes of the one that it changes."""
    if isinstance(inner, OrbaxSource):
        check_orbax_destination(dst)
        write_orbax(source, dst, dtype=None, force=force, progress=progress)
    else:
        write_hf(source, dst, dtype=None, shard_bytes=parse_size("5GB"), force=force, progress=progress)


def write_hf(
    source: AnySource, dst: Path_, *, dtype: str | None, shard_bytes: int, force: bool, progress: bool
) -> None:
    """Any source to a Hugging Face directory, local or remote."""
    dtype_of = _chooser(source, dtype)
    total = _bytes(source, dtype_of)
    if progress:
        names = sorted({dtype_of(s).name for s in source.slots})
        print(f"{dst}: {total:,} bytes of weights in {', '.join(names)}", file=sys.stderr)
    # Larger items first: every tensor then starts at a multiple of its item size.
    order = sorted(source.slots, key=lambda slot: -dtype_of(slot).itemsize)
    with new_directory(dst, needed_bytes=total, force=force) as work:
        sink = HfSink(work, [(slot, dtype_of(slot)) for slot in order], shard_bytes)
        try:
            with progress_bar(f"writing {dst}", total, show=progress) as advance:
                tally = copy(source, sink, dtype_of, advance, in_order=work.remote, slots=order)
        except BaseException:
            sink.abort()
            raise
        sink.close()
        _finish(source, work, dtype_of)
    _report(tally, dst, progress)


def open_source(path: Path_) -> AnySource:
    """A checkpoint of any kind: Hugging Face, Mistral's own, an Orbax model directory, a step of a training run.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is none of these, or not whole.
    """
    if not is_remote(path) and is_orbax(newest_step(Directory(path).local)):
        return open_orbax(path)
    return open_hf(path)


def open_hf(path: Path_, architectures: tuple[str, ...] = ("mixtral", "mistral")) -> AnySource:
    """A Hugging Face directory or Mistral's own layout."""
    directory = Directory(path)
    if not directory.remote and is_orbax(directory.local):
        raise ValueError(f"{path} is an Orbax checkpoint, not a Hugging Face directory: use orbax2hf")
    if is_mistral(directory):
        return MistralSource(path)
    return HfSource(path, architectures)


def open_orbax(path: Path_) -> OrbaxSource:
    """An Orbax model directory or one step of a training run (a run's directory stands for its newest step)."""
    if is_remote(path):
        raise ValueError(f"{path}: Orbax checkpoints are streamed from local disks only: copy it here first")
    root = Directory(path).local
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist")
    root = newest_step(root)
    if not is_orbax(root):
        raise ValueError(
            f"{root} is no Orbax model directory (config.json and {PARAMS}/) and no step of a training run "
            "(state/, dataset/, meta/)"
        )
    return OrbaxSource(root)


def check_orbax_destination(dst: Path_) -> None:
    """Raises: ValueError for a remote destination."""
    if is_remote(dst):
        raise ValueError(
            f"{dst}: an Orbax checkpoint is written to a local disk only: convert here, then copy it there"
        )


def newest_step(root: Path) -> Path:
    """The newest whole step of a run's directory; any other directory is itself."""
    directory = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    steps = [p for p in directory.iterdir() if p.name.isdigit()] if directory.is_dir() else []
    whole = [p for p in steps if (p / "commit_success.txt").is_file()]
    return max(whole, key=lambda p: int(p.name)) if whole else root


def _chooser(source: AnySource, dtype: str | None) -> Callable[[Slot], np.dtype]:
    if dtype is None:
        return source.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: bfloat16, float16 or float32")
    return lambda slot: DTYPES[dtype]


def _bytes(source: AnySource, dtype_of: Callable[[Slot], np.dtype]) -> int:
    return sum(slot.rows * slot.cols * dtype_of(slot).itemsize for slot in source.slots)


def _finish(source: AnySource, work: Directory, dtype_of: Callable[[Slot], np.dtype]) -> None:
    """The small files; config.json last, since without it nothing takes the directory for a model."""
    origin = side_files_origin(source)
    if origin is not None:
        names = origin.names()
        for name in SIDE_FILES:
            if name in names:
                work.write_bytes(name, origin.read_bytes(name))
    config: MixtralConfig = source.config
    content = export_config(source.hf_config, config, dtype_of(source.slots[0]).name)
    work.write_bytes("config.json", (json.dumps(content, indent=2) + "\n").encode())


def side_files_origin(source: AnySource) -> Directory | None:
    """Where the tokenizer of a source is: beside the weights, or where the training run took it from."""
    if source.directory is None or not getattr(source, "training", False):
        return source.directory
    named = training_meta(source.directory.local).get("config", {}).get("data", {}).get("tokenizer")
    if not isinstance(named, str) or not os.path.exists(named):
        return None
    return Directory(named if os.path.isdir(named) else os.path.dirname(os.path.abspath(named)))


def _report(tally: Tally, dst: Path_, progress: bool) -> None:
    if tally.not_finite:
        some = ", ".join(f"{name} ({what})" for name, what in list(tally.not_finite.items())[:8])
        warnings.warn(f"{len(tally.not_finite)} tensors hold values that are not finite: {some}", stacklevel=3)
    if progress:
        print(f"{dst}: {len(tally.rows)} tensors, {tally.bytes:,} bytes", file=sys.stderr)
