"""`routing`: what the routers of a checkpoint do with text, as a page, as numbers, and as the table of the paper."""

import contextlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from mixtral_jax import data as data_room
from mixtral_jax.config import ComputeConfig, MixtralConfig
from mixtral_jax.data.config import DataConfig, SourceConfig
from mixtral_jax.data.prepare import first_documents, write_atomically
from mixtral_jax.data.progress import say
from mixtral_jax.data.records import is_remote, stage_in
from mixtral_jax.data.text import Tokenizer, load_template
from mixtral_jax.parallel import BATCH_AXES, MeshConfig, make_mesh
from mixtral_jax.train.base import newest_step
from mixtral_jax.train.config import RunConfig, load_config, shape_of
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.evals.routing import Options, Result, measure, render
from mixtral_jax.train.meetings import agree
from mixtral_jax.train.read_model import (
    read_model,
    read_tokenizer,
    run_config,
    run_place,
    run_template,
    with_tokenizer,
)
from mixtral_jax.train.run import failures_reported, initialize, set_xla_flags

_FACTOR = 1.25  # where the run has no capacity
_BATCH_TOKENS, _SEQ_LEN = 8192, 1024  # the latter where no run says
_LEAST_TOKENS = 40  # of a domain: two, which are neighbours, of each of twenty documents
_SHAPE = ("num_hidden_layers", "num_local_experts", "num_experts_per_tok")
Documents = Mapping[str, Sequence[np.ndarray]]


def routing(
    checkpoint: str, *, data: Sequence[str] | None = None, against: str | None = None, tokens: int = 50_000,
    layers: str | None = None, seq_len: int | None = None, tokenizer: str | None = None, out: str | None = None,
    as_json: bool = False, **joining: Any,
) -> int:  # fmt: skip
    """Measure, write routing.html and routing.json, and print how often neighbouring tokens go the same way.

    Args:
        checkpoint: an Orbax or Hugging Face directory, a run, or one of its steps.
        data: NAME=PATH of each domain, or one run file; None: the validation sources of the run, else what is bundled.
        against: a checkpoint of the same shape and tokenizer, from which changes are counted.
        tokens: of each domain.
        layers: such as 0,15,31; None: all.
        seq_len: None: the run's, else 1024 or what the model knows.
        tokenizer: of both checkpoints; None: the run file's, else that of the checkpoint.
        out: where the files go; None: <run>/routing/<step>, or DIR-routing beside a model directory.
        joining: of `train.run.initialize`.

    Raises:
        UserError: a model has no routers, the two differ in shape or tokenizer, or an option is wrong.
        ValueError: a domain has no text, or a bad record.
    """
    named = load_config(data[0]).config if data and len(data) == 1 and "=" not in data[0] else None
    config = named or run_config(checkpoint)
    compute = config.compute if config else ComputeConfig()
    if named is None:  # the run's own kernels may be of another machine
        moe = compute.moe.model_copy(update={"matmul": "auto"})
        compute = compute.model_copy(update={"attention": "auto", "moe": moe, "xla_flags": "auto"})
    set_xla_flags(compute.xla_flags)
    initialize(**joining)
    first = jax.process_index() == 0
    with failures_reported(None):
        places = [newest_step(path) for path in (checkpoint, against) if path]  # once: a run may go on
        shape = _common_shape(places)
        options = _options(config, shape, layers, seq_len)
        domains = _domains(data, named, config)
        own = with_tokenizer(named, checkpoint).data.tokenizer if named else checkpoint
        codec = read_tokenizer(tokenizer or own)
        documents = _documents(domains, codec, tokens, shape, run_template(checkpoint) if named is None else None)
        if against and tokenizer is None:
            _check_same_tokens(read_tokenizer(against), codec, documents, against)
        directory = Path(out or _directory(checkpoint, places[0]))
        agree(checkpoint=Path(places[0]).name, text=_checksum(documents))
        if first:
            directory.mkdir(parents=True, exist_ok=True)
        mesh = _mesh(config, named is not None)
        shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES) if mesh else 1
        largest = min(_BATCH_TOKENS, max(sum(map(len, own)) for own in documents.values()))
        options = options._replace(rows=math.ceil(largest / options.seq_len / shards) * shards)
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            paths = zip((checkpoint, against), places, strict=False)
            models = [read_model(str(name), mesh=mesh, compute=compute, path=place) for name, place in paths]
            result = measure(
                models, documents, codec, options, names=places, asked=tokens, mesh=mesh, show=first,
                own_capacity=compute.moe.capacity_factor is not None,
            )  # fmt: skip
    if first:
        _write(result, directory, as_json)
    return 0


def _mesh(config: RunConfig | None, named: bool) -> Mesh | None:
    """The run's; of this machine, as of `eval --tasks`, where there is none, or nobody named it and it does not fit."""
    try:
        return make_mesh(config.mesh if config else MeshConfig())
    except ValueError as error:
        if named:
            raise
        if jax.process_index() == 0:
            say(f"note: the run's {error}; all devices here are taken for mesh.data")
        return make_mesh(MeshConfig())


def _write(result: Result, directory: Path, as_json: bool) -> None:
    text = json.dumps(result.to_json(), allow_nan=False)
    write_atomically(directory / "routing.json", text.encode())
    write_atomically(directory / "routing.html", render(result).encode())
    if as_json:
        print(text)
        return
    _print(result)
    print(f"the page: {directory / 'routing.html'}; its numbers: routing.json beside it")


def _checksum(documents: Documents) -> int:
    return zlib.crc32(np.concatenate([ids for own in documents.values() for ids in own]).tobytes())


def _common_shape(places: Sequence[str]) -> MixtralConfig:
    """The shape of the first checkpoint, which has routers and is a second one's too; lengths are what both know."""
    shape, *others = (shape_of(place) for place in places)
    if shape.is_dense:
        raise UserError(f"{places[0]} is a dense model: it has no routers")
    for other in others:
        told = [f"{key} {getattr(other, key)}, not {getattr(shape, key)}" for key in _SHAPE
                if getattr(other, key) != getattr(shape, key)]  # fmt: skip
        if told:
            raise UserError(f"--against: {places[1]} cannot be compared with {places[0]}: it has {' and '.join(told)}")
    lengths = ("vocab_size", "max_position_embeddings")
    return shape.model_copy(update={key: min(getattr(each, key) for each in (shape, *others)) for key in lengths})


def _options(config: RunConfig | None, shape: MixtralConfig, layers: str | None, seq_len: int | None) -> Options:
    most, own = shape.num_hidden_layers, config.seq_len if config else _SEQ_LEN
    try:
        chosen = tuple(sorted({int(word) for word in layers.split(",")})) if layers else tuple(range(most))
    except ValueError:
        raise UserError(f"--layers {layers} must be numbers, such as 0,{most - 1}") from None
    if not 0 <= chosen[0] <= chosen[-1] < most:
        raise UserError(f"--layers {layers}: the model has layers 0 to {most - 1}")
    length = min(own, shape.max_position_embeddings) if seq_len is None else seq_len
    if not 2 <= length <= shape.max_position_embeddings:
        raise UserError(f"--seq-len {length} must be from 2 to {shape.max_position_embeddings}, which the model knows")
    moe = (config.compute if config else ComputeConfig()).moe
    return Options(chosen, length, 0, moe.capacity_factor or _FACTOR, moe.capacity_order)


def _domains(data: Sequence[str] | None, named: RunConfig | None, config: RunConfig | None) -> DataConfig:
    """What the domains are, as validation sources: of a run file, of --data, or bundled."""
    if config and (named or data is None) and config.data.validation:
        return config.data
    if named:
        raise UserError(f"{data[0] if data else ''}: data.validation is empty, so that there are no domains")
    if data is None:
        bundled = sorted((Path(*data_room.__path__) / "samples").glob("*.val.jsonl.gz"))
        data = [f"{file.name.partition('.')[0]}={file}" for file in bundled]
    pairs = [entry.partition("=") for entry in data]
    for name, _, path in pairs:
        if not name or not path:
            raise UserError(f"--data {name or '='}{path} is no NAME=PATH; a run's YAML file stands alone")
    try:
        sources = tuple(SourceConfig(name=name, path=path) for name, _, path in pairs)
        return DataConfig(tokenizer="", train=sources, validation=sources)
    except ValidationError as error:
        raise UserError(f"--data: {error.errors()[0]['msg']}") from None


def _documents(domains: DataConfig, codec: Tokenizer, tokens: int, shape: MixtralConfig, template: Any) -> Documents:
    """Token ids of each domain."""
    if codec.vocab_size > shape.vocab_size:
        raise UserError(f"the tokenizer has {codec.vocab_size} pieces, the model knows {shape.vocab_size}")
    if tokens < _LEAST_TOKENS:
        raise UserError(f"--tokens {tokens} must be {_LEAST_TOKENS} or more")
    stage_in(domains.staging_dir, domains.staging_bytes)
    text = codec if domains.examples == "text" else load_template(template or domains.template, codec)
    return {source.name: first_documents(domains, source, text, tokens) for source in domains.validation}


def _check_same_tokens(theirs: Tokenizer, codec: Tokenizer, documents: Documents, against: str) -> None:
    """Whether the ids mean the same to both checkpoints, as far as the first documents show."""
    texts = [codec.decode(own[0].tolist()) for own in documents.values()]
    if any(theirs.encode(text) != codec.encode(text) for text in texts) or theirs.bos_id != codec.bos_id:
        raise UserError(f"--against: {against} has another tokenizer, so that tokens cannot be compared")


def _directory(checkpoint: str, place: str) -> Path:
    run = run_place(checkpoint)
    if is_remote(checkpoint):
        raise UserError(f"{checkpoint} is not on this machine: name a directory for the result with --out")
    path = Path(checkpoint).absolute()
    return path.with_name(f"{path.name}-routing") if run is None else run / "routing" / Path(place).name


def _print(result: Result) -> None:
    """The paper's table 5: of each domain, in the first, the middle and the last layer."""
    some = sorted({0, len(result.layers) // 2, len(result.layers) - 1})
    table = Table(title="Neighbouring tokens with the same first choice / with an expert in common")
    table.add_column("domain")
    for name in ("tokens", *(f"layer {result.layers[i]}" for i in some)):
        table.add_column(name, justify="right")
    for domain in (*result.domains, result.all):
        shares = (f"{domain.repeat_first_L[i]:.1%} / {domain.repeat_any_L[i]:.1%}" for i in some)
        table.add_row(domain.name, f"{domain.tokens:,}", *shares)
    table.add_row("chance", "", *[f"{result.chance_first:.1%} / {result.chance_any:.1%}"] * len(some))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for note in result.notes:
        console.print(note)
