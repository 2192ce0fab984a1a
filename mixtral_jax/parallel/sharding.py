"""Where every parameter and activation lives on the mesh.

The model runs inside one `jax.shard_map` over the whole mesh (`sharded`). Without a mesh (one device) every function
here is the identity.

Axes. `data`, `fsdp` and `expert` share the batch; `context` shares the sequence; `tensor` shares heads, ffn and
vocabulary. `fsdp` (and, for dense weights, `expert`) shard the parameters, which are gathered where they are used: the
transpose of that gather is a reduce-scatter, so gradients and optimizer state stay sharded (ZeRO-3).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.parallel import compiler_quirks as quirks
from mixtral_jax.parallel.collectives import axis_index, axis_size, gather_shards, inside, platform, varying
from mixtral_jax.parallel.context import spread, unspread, zigzag
from mixtral_jax.parallel.mesh import BATCH_AXES, TOKEN_AXES

WHOLE = "whole"  # what a logical axis that is gathered before use is called where that is done (whole.py)
# Logical axis of a parameter -> mesh axes that shard it. A name that is not here is an error.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert"),
    "expert_embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "experts": ("expert",),
    "router_experts": (),
    "gate_up": (),
    "ffn": ("tensor",),
    "norm": (),
    "lora_rank": (),
    "quantized_block": (),
    WHOLE: (),
}
# Logical axes that are gathered before use; the others are computed on as shards.
GATHERED = ("embed", "expert_embed")
# A logical axis that is gathered as one with the axis behind it, as products use it: a tile of (2, F) is not one of
# (2F), and joined after the gather the whole matrix would be copied.
JOINED = "gate_up"
# Where its mesh axes do not divide it, it is stored whole on each of their devices and padded where it is used.
PADDED = "vocab"


def is_spec(x: Any) -> bool:
    """Whether it is a PartitionSpec, which jax takes for a tree."""
    return isinstance(x, P)


# ---- placement, decided once -----------------------------------------------------------------------------------------


def param_spec(axes: Sequence[str], shape: Sequence[int], mesh_shape: Mapping[str, int], name: str) -> P:
    """PartitionSpec of a parameter with the logical `axes`.

    Raises:
        ValueError: a logical axis without a rule, a mesh axis used twice, or a dimension that it does not divide (a
            vocabulary is then not divided).
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions but {len(axes)} logical axes: {', '.join(axes)}")
    used: set[str] = set()
    spec: list[tuple[str, ...] | None] = []
    for logical, size in zip(axes, shape, strict=True):
        if logical not in LOGICAL_AXES:
            raise ValueError(f"{name}: logical axis {logical!r} has no rule in LOGICAL_AXES")
        mesh_axes = LOGICAL_AXES[logical]
        if used & set(mesh_axes):
            raise ValueError(
                f"{name}: two of its axes ({', '.join(axes)}) would be sharded over {used & set(mesh_axes)}"
            )
        used |= set(mesh_axes)
        parts = math.prod(mesh_shape[a] for a in mesh_axes)
        if size % parts and logical == PADDED:
            mesh_axes = ()
        elif size % parts:
            over = " x ".join(f"{a} {mesh_shape[a]}" for a in mesh_axes)
            held = name.endswith((".codes", ".scales"))  # of a base in blocks, each of several weights
            raise ValueError(
                f"{name}: its {logical} dimension {size} is not a multiple of {parts} (mesh {over}): choose a smaller "
                f"mesh.{max(mesh_axes, key=mesh_shape.__getitem__)} or {'lora.base_block' if held else 'pad the model'}"
            )
        spec.append(mesh_axes or None)
    return P(*spec)


def param_specs(model: nnx.Module, mesh: Any) -> Any:
    """PartitionSpecs shaped like `model`: a module whose leaves are specs."""
    mesh_shape = dict(mesh.shape)
    graphdef, state = nnx.split(model)
    specs = []
    for path, variable in nnx.to_flat_state(state):
        name, axes, shape = ".".join(map(str, path)), variable.get_metadata()["axes"], variable.shape
        own = ("data",) * (len(shape) - len(axes))  # see `replicas`
        specs.append(P(*own, *param_spec(axes, shape[len(own) :], mesh_shape, name)))
    return jax.tree.unflatten(jax.tree.structure(state), specs), graphdef


def param_shardings(model: nnx.Module, mesh: Mesh | None) -> dict | None:
    """NamedShardings as a nested dict with the keys of `nnx.to_pure_dict(nnx.state(model))`; None without a mesh."""
    return None if mesh is None else jax.tree.map(partial(NamedSharding, mesh), _pure_specs(model, mesh))


def _pure_specs(model: nnx.Module, mesh: Any) -> dict:
    """With the keys of `nnx.to_pure_dict(nnx.state(model))`."""
    specs, _ = param_specs(model, mesh)
    pure = nnx.to_pure_dict(nnx.state(model))
    return jax.tree.unflatten(jax.tree.structure(pure), jax.tree.leaves(specs, is_leaf=is_spec))


def replicas(model: nnx.Module, params: dict) -> dict:
    """Some parameters of `model` with an axis in front along `data`: each place's own, so that a gradient by them is
    not summed over `data`. Nothing is copied. `sharded` takes a model of such parameters as any other.
    """
    return _over_data(model, params, lambda x, _: varying(x, ("data",))[None], to_replicas=True)


def sum_replicas(model: nnx.Module, grads: dict) -> dict:
    """Gradients by `replicas`, summed over `data` in their parameters' `reduce_dtype`; as their parameters again."""
    return _over_data(
        model, grads, lambda g, dtype: jax.lax.psum(g[0].astype(dtype), "data").astype(g.dtype), to_replicas=False
    )


def _over_data(model: nnx.Module, tree: dict, run: Callable[[jax.Array, str], jax.Array], *, to_replicas: bool) -> dict:
    """run(leaf, the dtype that its sums have) on every device."""
    mesh, flat = jax.sharding.get_abstract_mesh(), flatten_dict(tree)
    specs = flatten_dict(_pure_specs(model, mesh))
    dtypes = {path: v.get_metadata()["reduce_dtype"] for path, v in nnx.to_flat_state(nnx.state(model))}
    whole = {path: specs[path] for path in flat}
    own = {path: P("data", *spec) for path, spec in whole.items()}
    ins, outs = (whole, own) if to_replicas else (own, whole)

    def local(leaves: dict) -> dict:
        return {path: run(leaf, dtypes[path]) for path, leaf in leaves.items()}

    return unflatten_dict(jax.shard_map(local, mesh=mesh, in_specs=(ins,), out_specs=outs)(flat))


def batch_spec(leading: int = 0) -> P:
    """Spec of a (..., B, T) array with `leading` unsharded dimensions before the batch."""
    return P(*(None,) * leading, BATCH_AXES, "context")


def batch_sharding(mesh: Mesh | None, leading: int = 1) -> NamedSharding | None:
    """Sharding of a Batch leaf (A, b, T); None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, batch_spec(leading))


def gather(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """A parameter in the compute dtype, whole along the axes that only store it (fsdp), still sharded along the others.

    Gradient: reduce-scatter over the gathered axes, then a sum over the axes on which the parameter is replicated; in
    the compute dtype, or in that of the parameter where its metadata say `reduce_dtype` float32.
    """
    w = param[...]
    if inside() and platform() == "tpu":
        w = quirks.as_stored(w)
    elif inside() and platform() == "gpu" and jnp.issubdtype(w.dtype, jnp.floating):
        w = quirks.row_major(w)
    if not inside():
        return checkpoint_name(quirks.cast(w, dtype), "weights")
    if param.get_metadata().get("reduce_dtype") != "float32":  # else cast behind the gathers, whose transposes add up
        w = quirks.cast(w, dtype)
    w = varying(w, TOKEN_AXES)
    names = param.get_metadata()["axes"][-w.ndim :]  # inside the scan over layers the leading axis is gone
    if JOINED in names:
        at = names.index(JOINED)
        w, names = w.reshape(*w.shape[:at], -1, *w.shape[at + 2 :]), (*names[:at], *names[at + 1 :])
    if PADDED in names:
        w = _own_rows(w, names.index(PADDED), param.get_metadata()["vocab"])
    for dim, name in enumerate(names):
        if name == "expert_embed" and dim == 2:  # rows of the last dimension are no neighbours: gather columns
            w = jnp.swapaxes(gather_shards(jnp.swapaxes(w, 1, 2), dtype, LOGICAL_AXES[name], 1), 1, 2)
        elif name in GATHERED:
            w = gather_shards(w, dtype, LOGICAL_AXES[name], dim)
    return checkpoint_name(quirks.cast(w, dtype), "weights")


def _own_rows(w: jax.Array, dim: int, vocab: int) -> jax.Array:
    """This device's share, zeros behind the last row, of a vocabulary that `tensor` does not divide."""
    shards = axis_size("tensor")
    if vocab % shards == 0:
        return w
    padding = [(0, -vocab % shards if axis == dim else 0) for axis in range(w.ndim)]
    w = jnp.pad(varying(w, (*TOKEN_AXES, "tensor")), padding)
    own = w.shape[dim] // shards
    return jax.lax.dynamic_slice_in_dim(w, axis_index("tensor") * own, own, dim)


def drop_padding(logits: Any, vocab: int) -> Any:
    """Logits without the columns that stand for no token."""
    return logits if logits.shape[-1] == vocab else logits[..., :vocab]


def sharded(
    local: Callable[..., Any], model: nnx.Module, args: tuple[Any, ...], in_specs: tuple[Any, ...], out_specs: Any
) -> Any:
    """local(model, *args) on every device's shards; a plain call without a mesh.

    Outputs that `out_specs` calls replicated must have been reduced: jax checks it while tracing. What a spec shards
    over `context` in its second dimension `local` sees, and returns, in zig-zag parts (parallel/context.py).

    Raises:
        ValueError: rows or their length that the mesh does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(model, *args)
    specs, graphdef = param_specs(model, mesh)
    _, state = nnx.split(model)
    for x, spec in zip(args, in_specs, strict=True):
        _check_rows(x, spec, dict(mesh.shape))

    def body(state: Any, *args: Any) -> Any:
        args = tuple(_along_context(spread, s, x) for s, x in zip(in_specs, args, strict=True))
        state = jax.tree.map(lambda s, x: x[0] if s[:1] == ("data",) else x, specs, state, is_leaf=is_spec)
        out = local(nnx.merge(graphdef, state), *args)
        return jax.tree.map(lambda s, x: _along_context(unspread, s, x), out_specs, out, is_leaf=is_spec)

    run = jax.shard_map(body, mesh=mesh, in_specs=(specs, *in_specs), out_specs=out_specs, check_vma=True)
    return run(state, *args)


def _splits_rows(spec: P) -> bool:
    return len(spec) > 1 and spec[1] == "context"


def _along_context(move: Callable[[jax.Array], jax.Array], spec: P, x: Any) -> Any:
    """`move` where the spec shards the tokens of a row over more than one device."""
    return jax.tree.map(move, x) if _splits_rows(spec) and jax.lax.axis_size("context") > 1 else x


def _check_rows(x: Any, spec: P, mesh_shape: dict[str, int]) -> None:
    if not _splits_rows(spec):
        return
    shards = math.prod(mesh_shape[a] for a in BATCH_AXES)
    if x.shape[0] % shards:
        over = " x ".join(f"{a} {mesh_shape[a]}" for a in BATCH_AXES)
        raise ValueError(
            f"{x.shape[0]} rows cannot be shared by {shards} batch shards (mesh {over}): "
            f"make micro_batch_size a multiple of {shards}"
        )
    if mesh_shape["context"] > 1:
        zigzag(x.shape[1], mesh_shape["context"])
