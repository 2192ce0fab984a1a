"""The conversions: open a source, check it, stream it into a new directory, put the small files beside it."""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mixtral_jax.convert.atomic import check_destination, new_directory
from mixtral_jax.convert.files import Directory, PathLike, is_remote
from mixtral_jax.convert.hf import ARCHITECTURES, HfSource, export_config, parse_size
from mixtral_jax.convert.mistral import MistralSource, is_mistral
from mixtral_jax.convert.orbax import PARAMS, OrbaxSink, OrbaxSource, is_orbax, newest_step, sibling
from mixtral_jax.convert.safetensors import TensorSink
from mixtral_jax.convert.stream import DtypeOf, Sink, Source, copy
from mixtral_jax.dtypes import SHORT, WEIGHTS

SHARD = "5GB"
_SECONDS_BETWEEN_LINES = 10.0


def hf2orbax(
    src: PathLike, dst: PathLike, *, dtype: str | None = None, force: bool = False, progress: bool = True
) -> None:
    """A Hugging Face directory (or Mistral's own layout) to an Orbax model directory.

    Args:
        dtype: bfloat16, float16 or float32; None keeps every tensor's own.
        force: replace `dst`, in one step, when the new directory is whole.

    Raises:
        ValueError: the source is not whole, not supported, or does not match its config.json; nothing is left at `dst`.
        FileExistsError: `dst` exists.
    """
    check_destination(dst, src, force=force, local=True)
    write_orbax(open_hf(src), dst, dtype=dtype, force=force, progress=progress)


def orbax2hf(
    src: PathLike,
    dst: PathLike,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = SHARD,
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
    check_destination(dst, src, force=force)
    source = open_orbax(src)
    if dtype is None and source.training:
        dtype = source.hf_config["dtype"]
    write_hf(source, dst, dtype=dtype, max_shard_size=max_shard_size, force=force, progress=progress)


def write_orbax(source: Source, dst: PathLike, *, dtype: str | None = None, force: bool, progress: bool) -> None:
    """Any source to an Orbax model directory."""
    check_destination(dst, force=force, local=True)
    dtype_of = chosen_dtype(source, dtype)
    small = None if source.template() is None else exported_files(source)
    tokens = {} if "eos_token_id" in source.hf_config else exported_files(source) if small is None else small
    config = _config(source, dtype_of, tokens)
    write(source, dst, OrbaxSink, dtype_of, *config, small=small, force=force, progress=progress)


def write_hf(
    source: Source,
    dst: PathLike,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = SHARD,
    small: Mapping[str, bytes] | None = None,
    force: bool,
    progress: bool,
) -> None:
    """Any source to a Hugging Face directory, local or remote.

    `small`: the files of the tokenizer; None: the source's, with all that transformers needs to give the same ids.
    """
    sink = partial(TensorSink, max_bytes=parse_size(max_shard_size))
    dtype_of = chosen_dtype(source, dtype)
    if progress:
        names = sorted({dtype_of(s).name for s in source.slots})
        print(f"{dst}: {_bytes(source, dtype_of):,} bytes of weights in {', '.join(names)}", file=sys.stderr)
    small = exported_files(source) if small is None else small
    config = _config(source, dtype_of, small)
    write(source, dst, sink, dtype_of, *config, small=small, force=force, progress=progress)


def exported_files(source: Source) -> Mapping[str, bytes]:
    """The files of its tokenizer, with all that transformers needs to give the same ids."""
    files = source.small_files()
    if not any(name in files for name in ("tokenizer.model", "tokenizer.json")):
        return files
    import mixtral_jax  # its front door: tokenizers belong to another room

    try:
        return mixtral_jax.tokenizer_files(files, source.template())
    except ValueError as error:
        print(f"the files of the tokenizer are copied as they are: {error}", file=sys.stderr)
        return files


def write_like(model: Source, source: Source, dst: PathLike, *, force: bool, progress: bool) -> None:
    """A changed source in the format and dtypes of the `model` that it changes."""
    write_model = write_orbax if isinstance(model, OrbaxSource) else write_hf
    write_model(source, dst, force=force, progress=progress)


def write(
    source: Source,
    dst: PathLike,
    open_sink: Callable[[Directory, Source, DtypeOf], AbstractContextManager[Sink]],
    dtype_of: DtypeOf,
    name: str,
    content: dict[str, Any],
    *,
    small: Mapping[str, bytes] | None = None,
    force: bool,
    progress: bool,
    beside: Callable[[Directory], None] = lambda work: None,
) -> None:
    """Stream a source into a new directory through a sink, and put the small files beside it, and what `beside` writes.

    `name` with the JSON `content` is last, since without it nothing takes the directory for what it is.
    """
    total, small = _bytes(source, dtype_of), source.small_files() if small is None else small
    with new_directory(dst, needed_bytes=total, force=force) as work:
        with (
            open_sink(work, source, dtype_of) as sink,
            progress_bar(f"writing {dst}", total, show=progress) as advance,
        ):
            tally = copy(source, sink, dtype_of, advance, in_order=work.remote)
        for file, text in small.items():
            work.write_bytes(file, text)
        beside(work)
        work.write_json(name, content)
    if tally.not_finite:
        some = ", ".join(f"{name} ({what})" for name, what in list(tally.not_finite.items())[:8])
        warnings.warn(f"{len(tally.not_finite)} tensors hold values that are not finite: {some}", stacklevel=3)
    if progress:
        print(f"{dst}: {len(tally.rows)} tensors, {tally.bytes:,} bytes", file=sys.stderr)


def open_source(path: PathLike) -> Source:
    """A checkpoint of any kind: Hugging Face, Mistral's own, an Orbax model directory, a step of a training run.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is none of these, or not whole.
    """
    if not is_remote(path) and is_orbax(newest_step(Directory(path).local)):
        return open_orbax(path)
    return open_hf(path)


def open_base(path: PathLike, noted: Mapping[str, Any] | None) -> Source:
    """The base of adapters: of a run's directory the step that their run noted, where that is still there."""
    step = None if noted is None else noted.get("step")
    if step is None or is_remote(path):
        return open_source(path)
    return open_source(sibling(str(newest_step(Directory(path).local)), step))


def open_hf(path: PathLike, architectures: tuple[str, ...] = ARCHITECTURES) -> Source:
    """A Hugging Face directory or Mistral's own layout."""
    directory = Directory(path)
    if not directory.remote and is_orbax(directory.local):
        raise ValueError(f"{path} is an Orbax checkpoint, not a Hugging Face directory: use orbax2hf")
    return MistralSource(path) if is_mistral(directory) else HfSource(path, architectures)


def open_orbax(path: PathLike) -> OrbaxSource:
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


def chosen_dtype(source: Source, dtype: str | None) -> DtypeOf:
    """The dtype in which each slot is written; None: its own."""
    if dtype is None:
        return source.dtype
    known = WEIGHTS | SHORT
    if dtype not in known:
        raise ValueError(f"dtype {dtype!r} is not known: bfloat16, float16 or float32")
    return lambda slot: known[dtype]


def _bytes(source: Source, dtype_of: DtypeOf) -> int:
    return sum(slot.rows * slot.cols * dtype_of(slot).itemsize for slot in source.slots)


def _config(source: Source, dtype_of: DtypeOf, small: Mapping[str, bytes]) -> tuple[str, dict[str, Any]]:
    """config.json, with the tokens of the tokenizer beside it where the source does not name others."""
    told: Any = None
    with suppress(ValueError):  # a file of others
        told = json.loads(small.get("generation_config.json", b"{}"))
    ids: dict[str, int] = {}
    for key in ("bos_token_id", "eos_token_id") if isinstance(told, dict) else ():
        first = told.get(key)[0] if isinstance(told.get(key), list) and told[key] else told.get(key)
        ids |= {key: first} if isinstance(first, int) else {}
    return "config.json", export_config({**ids, **source.hf_config}, source.config, dtype_of(source.slots[0]).name)


@contextmanager
def progress_bar(title: str, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told the bytes done; bytes, rate and time left go to stderr."""
    terminal = sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not (show and terminal)
    ) as bar:
        task = bar.add_task(title, total=total)
        began = last = time.monotonic()

        def advance(n: int) -> None:
            nonlocal last
            bar.advance(task, n)
            now, done = time.monotonic(), bar.tasks[0].completed
            if terminal or not show or (now - last < _SECONDS_BETWEEN_LINES and done < total):
                return
            last, rate = now, done / max(now - began, 1e-9)
            text = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"
            print(f"{title}: {text}, {(total - done) / max(rate, 1.0):.0f} s left", file=sys.stderr, flush=True)

        yield advance
