"""The weights that a run starts from: what init_from names, straight onto the devices in the form they are held in.

That form is fp32 masters, bfloat16, or int8 and nf4 in blocks for the frozen base under adapters. A quantised matrix
is read, quantised on the device and put in its place by the pieces in which it lies on disk (one layer and expert, or a
run of small ones), so the base is never in memory as a whole in a wider form, neither on the host nor on the devices.
"""

import functools
import math
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from flax import nnx
from flax.traverse_util import unflatten_dict

from mixtral_jax import checkpoint
from mixtral_jax.convert import (
    Directory,
    Leaf,
    Source,
    can_be_compared,
    check_identity,
    check_same_model,
    edges,
    is_remote,
    is_training_checkpoint,
    open_adapter,
    open_source,
    place,
    place_leaf,
    sibling,
    weights_identity,
)
from mixtral_jax.convert import leaves as stored_leaves
from mixtral_jax.convert import newest_step as newest_whole_step
from mixtral_jax.data.progress import say
from mixtral_jax.lora import is_adapter
from mixtral_jax.model import abstract_model
from mixtral_jax.quantize import QuantizedWeight, quantize
from mixtral_jax.train.checkpoints import find
from mixtral_jax.train.config import DpoStageConfig, RunConfig, read_tree, shape_of
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.weights import Tree, abstract_params, is_trained, join, keep, leaves, random_weights

Config = TypeVar("Config", bound=RunConfig)
_say_once = functools.cache(say)


def base_weights(config: RunConfig, abstract: Tree) -> Tree:
    """The weights that the run starts from, without adapters: init_from's, or random ones by the seed.

    Raises:
        UserError: init_from holds no whole model, or one of another shape.
    """
    base = keep(abstract, lambda path: not is_adapter(path))
    if config.init_from is None:
        return random_weights(config, base)
    path = _whole_model(config.init_from)
    if config.adapters is None or not config.adapters.quantizes:
        return read_weights(path, base)
    model = abstract_model(config.model, config.compute, lora=config.adapters)
    held = {".".join(map(str, p)): m for p, m in nnx.iter_modules(model) if isinstance(m, QuantizedWeight)}
    shapes = {leaf.path: leaf.shape for leaf in stored_leaves(config.model)}
    try:
        return _read_leaves(path, shapes, dict(leaves(base)), held)
    except ValueError as error:
        raise UserError(f"init_from: {error}") from error


def _whole_model(named: str) -> str:
    """The checkpoint that init_from names.

    Raises:
        UserError: it holds adapters only.
    """
    path = newest_step(named)
    if holds_adapters(path):
        raise UserError(
            f"init_from: {path} holds adapters only: fold them into their base first with "
            f"convert merge-lora BASE MERGED --adapter {path}, then name MERGED here"
        )
    return path


def by_tensorflow(address: str) -> bool:
    """Whether epath takes TensorFlow for it, where that is installed: no library of fsspec is needed."""
    return address.startswith(("gs://", "s3://")) and find_spec("tensorflow") is not None


def check_base(config: RunConfig, resumes: bool) -> list[str]:
    """Whether init_from and lora.init_from hold what the run needs; reads no weights. Notes as `check_base_shape`.

    A run that resumes has its adapter, and needs that of lora.init_from no more.

    Raises:
        UserError: they are not there, are no checkpoints, or have other parameters.
    """
    if config.init_from is not None and is_remote(config.init_from):
        try:
            there = (epath.Path if by_tensorflow(config.init_from) else Directory)(config.init_from).exists()
        except ValueError as error:
            raise UserError(f"init_from: {error}") from error
        if not there:
            raise UserError(f"init_from: {config.init_from} does not exist")
    notes = check_base_shape(config)
    if config.init_from is not None:
        path = _whole_model(config.init_from)
        if not is_remote(path) and (_kind_of(path) != "params" or (Path(path) / "config.json").exists()):
            try:
                check_leaves(path, open_source(path), {leaf.path: leaf.shape for leaf in stored_leaves(config.model)})
            except ValueError as error:
                raise UserError(f"init_from: {error}") from error
    if not resumes and config.adapters is not None and config.adapters.init_from is not None:
        trained = keep(abstract_params(config, None), is_trained(config))
        matching_adapter(config, dict(leaves(trained)))
    return notes


def needs_base(config: RunConfig) -> bool:
    """Whether the weights that it began with are made again when it goes on: under adapters, and as a reference."""
    reference = config.reference if isinstance(config, DpoStageConfig) else "none"
    return config.adapters is not None or reference != "none"


def stands_on_base(config: RunConfig) -> bool:
    """Whether these are read again, from init_from."""
    return config.init_from is not None and needs_base(config)


def pin_base(config: Config, noted: Mapping[str, Any] | None) -> tuple[Config, dict[str, Any] | None]:
    """The config with init_from as the weights that the run began with, and what is noted of these.

    Weights far away have no digest, for which all would be fetched: their place stands for them.

    Args:
        noted: what a checkpoint of the run says of its base; None: the run begins, or the checkpoint is an old one.

    Raises:
        UserError: init_from holds other weights than those; a run whose checkpoint is still there stands for it.
    """
    if config.init_from is None or not stands_on_base(config):
        return config, None
    path = sibling(newest_step(config.init_from), noted["step"] if noted else None)
    if noted and path != noted["path"] and (is_remote(path) or is_remote(noted["path"])):
        raise UserError(
            f"init_from: {path} cannot be compared, for what is not on this machine has no digest, with the base of "
            f"the run, {noted['path']}: name that, or train anew under another run_name"
        )
    try:
        source = None if is_remote(path) else open_source(path)
        if source is not None:
            check_identity(noted, source, f"init_from: {path}")
    except (ValueError, FileNotFoundError) as error:
        if noted:
            raise UserError(str(error)) from error
        return config, None  # what is wrong with it is said where the weights are read
    if not noted:
        name = path.rpartition("/")[2]
        step = int(name) if name.isdigit() and is_training_checkpoint(path) else None
        noted = {"step": step, "digest": source and weights_identity(source)}
    elif source is not None and not can_be_compared(noted):
        noted = {**noted, "digest": weights_identity(source)}  # an earlier version's: from here on they are compared
    return config.model_copy(update={"init_from": path}), {**noted, "path": path}


def matching_adapter(config: RunConfig, wanted: Mapping[str, Any]) -> Source:
    """lora.init_from, which has what is to be trained: `wanted`, by dotted path.

    Raises:
        UserError: it is of another rank, scale, choice of matrices or base than the run's.
    """
    lora = config.adapters
    assert lora is not None and lora.init_from is not None
    try:
        adapter = open_adapter(lora.init_from, config.model)
        check_same_model(config.model, adapter, "the run")
        base = config.init_from and newest_step(config.init_from)
        if base and adapter.base_noted is not None and not is_remote(base):
            check_identity(adapter.base_noted, open_source(base), base)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"lora.init_from: {error}") from error
    found = {slot.leaf.path: slot.leaf for slot in adapter.slots}
    scales = {"rank": (lora.rank, adapter.lora.rank), "alpha / rank": (lora.scale, adapter.lora.scale)}
    told = [f"{key} {b:g}, the run's is {a:g}" for key, (a, b) in scales.items() if not math.isclose(a, b)]
    told += [f"{path}, which the run does not train" for path in sorted(found.keys() - wanted.keys())]
    told += [f"no {path}" for path in sorted(wanted.keys() - found.keys()) if is_adapter(path)]
    shapes = {path: (found[path].shape, wanted[path].shape) for path in sorted(found.keys() & wanted.keys())}
    other = [f"{path} of shape {b}, the run's is {a}" for path, (b, a) in shapes.items() if not told and a != b]
    if told or other:
        do = "set lora as the adapter is" if told else "convert resize-vocab gives the base as many rows as the adapter"
        raise UserError(f"lora.init_from: {lora.init_from} has {'; '.join([*told, *other][:4])}: {do}")
    return adapter


def adapter_weights(config: RunConfig, abstract: Tree) -> Tree:
    """The adapters of lora.init_from, and what was trained whole beside them, placed as `abstract`, the trained, says.

    Raises:
        UserError: they are of another rank, scale, choice of matrices or base than the run's.
    """
    wanted = dict(leaves(abstract))
    adapter = matching_adapter(config, wanted)
    found = {slot.leaf.path: slot.leaf for slot in adapter.slots}
    placed = {
        path: place_leaf(adapter, leaf, wanted[path].sharding, wanted[path].dtype) for path, leaf in found.items()
    }
    return unflatten_dict(placed, sep=".")


def first_params(config: RunConfig, base: Tree, abstract: Tree) -> Tree:
    """What is trained (`abstract`) as the run begins: of the base, and adapters that are new or lora.init_from's."""
    lora, trained = config.adapters, {path for path, _ in leaves(abstract)}
    if lora is None:
        return keep(base, trained.__contains__)
    made = adapter_weights(config, abstract) if lora.init_from else random_weights(config, keep(abstract, is_adapter))
    own = {path for path, _ in leaves(made)}
    return join(keep(base, (trained - own).__contains__), made)


def check_base_shape(config: RunConfig) -> list[str]:
    """What a person should know of the model of init_from, which is the same as the run's but for that.

    Raises:
        UserError: it would compute something else with these weights; each setting is named with both values.
    """
    if config.init_from is None:
        return []
    path = newest_step(config.init_from)
    try:
        theirs = shape_of(path)
    except (OSError, ValueError):
        return []  # what is wrong with it is said where the weights are read
    different = config.model.differences(theirs)
    if config.model.vocab_size != theirs.vocab_size:
        different["vocab_size"] = (config.model.vocab_size, theirs.vocab_size)
    if different:
        told = "; ".join(f"model.{key} is {ours}, there it is {made}" for key, (ours, made) in different.items())
        add = "; convert resize-vocab adds rows" if "vocab_size" in different else ""
        raise UserError(
            f"init_from: {path} holds another model: {told}. Remove what differs, or set model to null, which takes "
            f"the model from there{add}"
        )
    ours, made = (model.router_aux_loss_coef for model in (config.model, theirs))
    return [f"model.router_aux_loss_coef is {ours:g}, that of init_from {made:g}: the first is kept"] * (ours != made)


def newest_step(path: str) -> str:
    """The newest whole checkpoint of a run's directory, wherever the run keeps them; of `best` the step for which it
    stands; any other path as it is.

    Raises:
        UserError: it is a run, and none of its checkpoints is whole.
    """
    if is_remote(path):
        return path
    place, file = Path(path), Path(path) / "config.yaml"
    if place.is_symlink() and is_training_checkpoint(place):  # it will stand for another one
        return str(place.parent / place.readlink())
    if not file.is_file() or (place / "config.json").exists():  # a model directory may hold a config.yaml of others
        newest = newest_whole_step(place)
        return path if newest == place else str(newest)
    kept = checkpoints_of(place)
    try:
        found = find(kept, "must", _say_once)
    except UserError as error:
        raise UserError(f"{path} is a run, but none of its checkpoints in {kept} is whole") from error
    return path if found is None else str(found.path)


def checkpoints_of(run: Path) -> epath.PathLike:
    """Where a run keeps its checkpoints, as its config.yaml says; any other directory is itself."""
    file = run / "config.yaml"
    return read_tree(file).find("checkpoint.directory")[1] or run / "checkpoints" if file.is_file() else run


def holds_adapters(path: str) -> bool:
    """Whether it is a step of a run that trained adapters."""
    return is_training_checkpoint(path) and any(map(is_adapter, checkpoint.tree_shapes(path)))


def read_weights(path: str, abstract: Tree) -> Tree:
    """Weights of an Orbax model directory, of a step of a run, or of a Hugging Face or Mistral directory, as asked for.

    Raises:
        UserError: the directory is none of them, or a leaf has another shape than the model (it is named).
    """
    root, found, wanted = epath.Path(path), _kind_of(path), dict(leaves(abstract))
    try:
        if is_remote(path) and found == checkpoint.STATE:
            return checkpoint.restore(root, {"params": abstract}, partial=True)["params"]
        if found == "params" and (is_remote(path) or not (root / "config.json").exists()):
            return checkpoint.restore(root / "params", abstract)
        return _read_leaves(path, {name: leaf.shape for name, leaf in wanted.items()}, wanted)
    except ValueError as error:
        raise UserError(f"init_from: {error}") from error


def _kind_of(path: str) -> str:
    kinds = (checkpoint.STATE, "params", "config.json", "params.json")
    found = next((kind for kind in kinds if (epath.Path(path) / kind).exists()), None)
    if found is None:
        raise UserError(
            f"init_from: {path} is no checkpoint: an Orbax model directory has params/, a step of a run state/, "
            "a Hugging Face directory config.json, Mistral's own params.json"
        )
    return found


def _read_leaves(
    path: str,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, Any],
    held: Mapping[str, QuantizedWeight] | None = None,
) -> Tree:
    """A checkpoint of any format onto the devices; each process reads only the parts of its own devices, each once.

    Args:
        shapes: of the model's parameters by dotted path, as a checkpoint has them.
        wanted: a placed ShapeDtypeStruct for each leaf of the result; a quantised matrix has two, codes and scales.
        held: the matrices that are quantised.

    Raises:
        ValueError: the checkpoint has other parameters; the first difference is named.
    """
    source, held = open_source(path), held or {}
    found = check_leaves(path, source, shapes)
    placed: dict[str, jax.Array] = {}
    for name, leaf in found.items():
        if name in held:
            names = (f"{name}.codes", f"{name}.scales")
            values = _place_blocks(source, leaf, held[name], *(wanted[n] for n in names))
            placed |= dict(zip(names, values, strict=True))
        else:
            placed[name] = place_leaf(source, leaf, wanted[name].sharding, np.dtype(wanted[name].dtype))
    return unflatten_dict(placed, sep=".")


def check_leaves(path: str, source: Source, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Leaf]:
    """The leaves of a checkpoint by dotted path, which are those of the model.

    Raises:
        ValueError: the first that is not.
    """
    found = {leaf.path: leaf for leaf in stored_leaves(source.config)}
    for name in sorted(shapes.keys() | found.keys()):
        if name not in shapes:
            raise ValueError(f"{path} has {name}, which the model does not have")
        if name not in found or found[name].shape != shapes[name]:
            has = f"has shape {found[name].shape}" if name in found else "is missing"
            raise ValueError(f"{name} {has} in {path}, but the model has {name} with shape {shapes[name]}")
    return found


def _place_blocks(source: Source, leaf: Leaf, held: QuantizedWeight, codes: Any, scales: Any) -> list[jax.Array]:
    """Codes and scales of one stacked matrix, each device's part made from that part of the weights alone."""
    axis = len(leaf.shape) + held.from_end
    size = leaf.shape[axis] // scales.shape[axis]
    run = jax.jit(partial(quantize, axis=axis, block=size, bits=held.bits))

    def make(values: np.ndarray, at: tuple[int, ...]) -> list[tuple[np.ndarray, tuple[int, ...]]]:
        at = (*at[:axis], at[axis] // size, *at[axis + 1 :])
        first, second = map(np.asarray, run(values.astype(np.float32)))
        return [(first, (*at[: axis + 1], 0, *at[axis + 1 :])), (second, at)]

    boxes = {}
    for device, index in scales.sharding.addressable_devices_indices_map(scales.shape).items():
        box = list(edges(index, scales.shape))
        box[axis] = (box[axis][0] * size, box[axis][1] * size)  # of the weights: whole blocks
        boxes[device] = tuple(box)
    return place(source, leaf, boxes, [codes, scales], make)
