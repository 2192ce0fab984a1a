"""What is trained and what is kept: the split of the parameters, and the model that they make together.

Under LoRA the adapters are trained (and the router, where asked for); the base is `frozen`: outside the donated state
and outside checkpoints, read again from init_from when a run resumes. A frozen router without LoRA stays among the
parameters, so that checkpoints hold a whole model: its gradient is cut and its learning rate is 0.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mixtral_jax.lora import is_adapter
from mixtral_jax.model import Mixtral, abstract_model
from mixtral_jax.parallel import param_shardings
from mixtral_jax.seeds import random_key
from mixtral_jax.train.config import RunConfig

Tree = Any  # nested dict with a leaf for each parameter
ROUTER = "layers.moe.router"


def leaves(tree: Tree) -> list[tuple[str, Any]]:
    """(dotted path, leaf), in the order of the paths."""
    return sorted(flatten_dict(tree, sep=".").items())


def keep(tree: Tree, wanted: Callable[[str], bool]) -> Tree:
    """The part of a tree whose dotted paths are wanted, without empty branches."""
    return unflatten_dict({path: leaf for path, leaf in leaves(tree) if wanted(path)}, sep=".")


def join(first: Tree, second: Tree | None) -> Tree:
    """Both trees in one; no leaf may be in both."""
    return first if second is None else unflatten_dict({**flatten_dict(first), **flatten_dict(second)})


def is_trained(config: RunConfig) -> Callable[[str], bool]:
    """Whether a parameter belongs to the trained ones (a frozen router without LoRA does, with a gradient of 0)."""
    if config.adapters is None:
        return lambda path: True
    whole = {*config.adapters.whole, *([ROUTER] if config.router_factor > 0 else [])}
    return lambda path: is_adapter(path) or path in whole


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


def fresh_weights(config: RunConfig) -> Tree:
    """Random parameters by the seed, adapters included; for use under jit, where what is dropped is never computed."""
    model = Mixtral(config.model, config.compute, key=random_key(config.seed), lora=config.adapters)
    return nnx.to_pure_dict(nnx.state(model))


def random_weights(config: RunConfig, abstract: Tree) -> Tree:
    """Random parameters by the seed with the paths and placement of `abstract`, made where they lie."""
    paths = {path for path, _ in leaves(abstract)}
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # runs once: the CPU's compiler takes 15 s for it at its highest level and 3 at its first, with the same numbers
    once = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    make = lambda: keep(fresh_weights(config), paths.__contains__)  # noqa: E731 - short
    return jax.jit(make, out_shardings=shardings, compiler_options=once)()


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
    if not config.router_factor and not config.model.is_dense:
        head += f"; the router {'moves by its adapter alone' if lora.adapts('moe.router') else 'is frozen'}"
    head += "" if lora.base_dtype == "float32" else f"; the base is held in {lora.base_dtype}"
    width = max(map(len, rows))
    return [head, *(f"  {name:{width}}  {size:>14,}" for name, size in rows.items())]
