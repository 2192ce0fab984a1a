"""What is trained and what is kept: the split of the parameters, and where they come from at the start.

Under LoRA the adapters are trained (and the router, where asked for); the base is `frozen`: outside the donated state
and outside checkpoints, read again from init_from when a run resumes. A frozen router without LoRA stays among the
parameters, so that checkpoints hold a whole model: its gradient is cut and its learning rate is 0.
"""

import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from flax import nnx

from mixtral_jax.checkpoint.trees import STATE, read_item, tree_shapes
from mixtral_jax.config import MixtralConfig
from mixtral_jax.convert.files import is_remote
from mixtral_jax.convert.pipeline import newest_step as newest_whole_step
from mixtral_jax.convert.pipeline import open_source
from mixtral_jax.lora import is_adapter
from mixtral_jax.model import Mixtral, abstract_model
from mixtral_jax.parallel.sharding import param_shardings
from mixtral_jax.train.checkpoints.checkpointer import find
from mixtral_jax.train.config.load import load_config
from mixtral_jax.train.config.schema import RunConfig
from mixtral_jax.train.errors import UserError
from mixtral_jax.train.held_base import read_quantized
from mixtral_jax.train.state import read_weights

Tree = Any  # nested dict with a leaf for each parameter
ROUTER = "layers.moe.router"


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf), in the order of the paths' parts."""
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from leaves(tree[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tree[key]


def keep(tree: Tree, wanted: Callable[[str], bool], prefix: str = "") -> Tree:
    """The part of a tree whose dotted paths are wanted, without empty branches."""
    kept = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            branch = keep(value, wanted, f"{prefix}{key}.")
            if branch:
                kept[key] = branch
        elif wanted(f"{prefix}{key}"):
            kept[key] = value
    return kept


def join(first: Tree, second: Tree | None) -> Tree:
    """Both trees in one; no leaf may be in both."""
    if second is None:
        return first
    joint = dict(first)
    for key, value in second.items():
        joint[key] = join(joint[key], value) if key in joint else value
    return joint


def is_trained(config: RunConfig) -> Callable[[str], bool]:
    """Whether a parameter belongs to the trained ones (a frozen router without LoRA does, with a gradient of 0)."""
    if config.adapters is None:
        return lambda path: True
    return lambda path: is_adapter(path) or (path == ROUTER and config.router_factor > 0)


def make_merge(config: RunConfig) -> Callable[[Tree, Tree | None], Mixtral]:
    """(trained, frozen) -> model."""
    graphdef, _ = nnx.split(abstract_model(config.model, config.compute, lora=config.adapters))
    fixed_router = config.adapters is None and config.router_factor == 0 and not config.model.is_dense

    def merge(params: Tree, frozen: Tree | None) -> Mixtral:
        if fixed_router:
            router = jax.lax.stop_gradient(params["layers"]["moe"]["router"])
            moe = {**params["layers"]["moe"], "router": router}
            params = {**params, "layers": {**params["layers"], "moe": moe}}
        return nnx.merge(graphdef, join(params, frozen))

    return merge


def make_base_merge(config: RunConfig) -> Callable[[Tree], Mixtral]:
    """Parameters without adapters -> model, its base held as under adapters."""
    base = None if config.adapters is None else config.adapters.base_only
    graphdef, _ = nnx.split(abstract_model(config.model, config.compute, lora=base))
    return lambda params: nnx.merge(graphdef, params)


def abstract_params(config: RunConfig, mesh: jax.sharding.Mesh | None) -> Tree:
    """Shape, dtype and placement of every parameter, adapters included."""
    model = abstract_model(config.model, config.compute, lora=config.adapters)
    shapes, shardings = nnx.to_pure_dict(nnx.state(model)), param_shardings(model, mesh)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda x: here, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def base_weights(config: RunConfig, abstract: Tree) -> Tree:
    """The weights that the run starts from, without adapters: init_from's, or random ones by the seed.

    Raises:
        UserError: init_from holds no whole model, or one of another shape.
    """
    base = keep(abstract, lambda path: not is_adapter(path))
    if config.init_from is None:
        return _fresh(config, base)
    path = newest_step(config.init_from)
    if (epath.Path(path) / STATE).exists() and any(is_adapter(name) for name in tree_shapes(path)):
        raise UserError(
            f"init_from: {path} holds adapters only: fold them into their base first with "
            f"convert merge-lora BASE MERGED --adapter {path}, then name MERGED here"
        )
    if config.adapters is None or not config.adapters.quantizes:
        return read_weights(path, base)
    model = abstract_model(config.model, config.compute, lora=config.adapters)
    return read_quantized(path, model, dict(leaves(base)))


def base_warnings(config: RunConfig) -> list[str]:
    """What the model of init_from computes otherwise than this run's, although its weights fit."""
    if config.init_from is None:
        return []
    path = newest_step(config.init_from)
    try:
        if (epath.Path(path) / STATE).exists():  # a step of a run, which may be remote
            theirs = MixtralConfig(**read_item(path, "meta")["config"]["model"])
        else:
            theirs = open_source(path).config
    except (OSError, KeyError, ValueError):
        # What is wrong with it is said where the weights are read; a remote Orbax model directory is read there only.
        return []
    return [
        f"model.{key} is {ours}, but the weights of init_from were made with {made}"
        for key, (ours, made) in config.model.differences(theirs).items()
    ]


def fresh_adapters(config: RunConfig, abstract: Tree) -> Tree:
    """Adapters that change nothing yet."""
    return _fresh(config, keep(abstract, is_adapter))


def fresh_weights(config: RunConfig) -> Tree:
    """Random parameters by the seed, adapters included; for use under jit, where what is dropped is never computed."""
    model = Mixtral(config.model, config.compute, key=jax.random.key(config.seed), lora=config.adapters)
    return nnx.to_pure_dict(nnx.state(model))


def _fresh(config: RunConfig, abstract: Tree) -> Tree:
    """Random parameters, made where they lie."""
    paths = {path for path, _ in leaves(abstract)}
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda: keep(fresh_weights(config), paths.__contains__), out_shardings=shardings)()


def newest_step(path: str) -> str:
    """The newest whole checkpoint of a run's directory, wherever the run keeps them; any other path as it is.

    Raises:
        UserError: it is a run, and none of its checkpoints is whole.
    """
    if is_remote(path):
        return path
    place, file = Path(path), Path(path) / "config.yaml"
    if not file.is_file() or (place / "config.json").exists():  # a model directory may hold a config.yaml of others
        newest = newest_whole_step(place)
        return path if newest == place else str(newest)
    kept = load_config(file).config.checkpoint.directory or place / "checkpoints"
    try:
        found = find(kept, "must", _say_once)
    except UserError as error:
        raise UserError(f"{path} is a run, but none of its checkpoints in {kept} is whole") from error
    return path if found is None else str(found.path)


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def trainable_table(config: RunConfig, abstract: Tree) -> list[str]:
    """What is trained, one line for each kind of matrix, with its share of all parameters."""
    trained, sizes = is_trained(config), dict(leaves(abstract))
    total = config.model.num_params() + sum(leaf.size for path, leaf in sizes.items() if is_adapter(path))
    rows: dict[str, int] = {}
    for path, leaf in sizes.items():
        if trained(path) and not (path == ROUTER and config.router_factor == 0):
            name = re.sub(r"_lora\.[ab]$", " (adapter)", path.removeprefix("layers."))
            rows[name] = rows.get(name, 0) + leaf.size
    count = sum(rows.values())
    head = f"{count:,} of {total:,} parameters are trained ({100 * count / total:.3g} %)"
    if config.adapters is None:
        if config.router_factor != 1:
            state = (
                "frozen" if config.router_factor == 0 else f"trained at {config.router_factor:g} x the learning rate"
            )
            head += f"; the router is {state}"
        return [head]
    lora = config.adapters
    head += f": rank {lora.rank}, scale {lora.scale:g}" + (f", dropout {lora.dropout:g}" if lora.dropout else "")
    head += "" if config.router_factor or config.model.is_dense else "; the router is frozen"
    head += "" if lora.base_dtype == "float32" else f"; the base is held in {lora.base_dtype}"
    width = max(map(len, rows))
    return [head, *(f"  {name:{width}}  {size:>14,}" for name, size in rows.items())]
