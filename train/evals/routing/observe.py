"""What a model's routers decide for a domain's tokens: rows, one forward pass a batch, choices back on the host."""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mixtral_jax.model import Mixtral
from mixtral_jax.moe import Routing, limit_capacity, router_stats
from mixtral_jax.train.feed import batch_share, make_put


class Tokens(NamedTuple):
    """The tokens of a domain, document after document, cut into rows of T as training cuts them."""

    ids_N: np.ndarray
    document_N: np.ndarray  # which one, from 0
    positions_N: np.ndarray  # from 0 in every document and row: nothing sees across a row's end

    @property
    def neighbours(self) -> np.ndarray:
        """(N - 1,) bool: whether a token and the next one are of one document and row."""
        return self.positions_N[1:] > 0


def tokens_of(documents: Sequence[np.ndarray], seq_len: int) -> Tokens:
    """Documents (n,) each, for rows of `seq_len`."""
    lengths = np.array([len(each) for each in documents])
    document_N = np.repeat(np.arange(len(documents)), lengths)
    at_N = np.arange(len(document_N))
    begin_N = np.maximum((np.cumsum(lengths) - lengths)[document_N], at_N // seq_len * seq_len)
    return Tokens(np.concatenate(documents).astype(np.int32), document_N, (at_N - begin_N).astype(np.int32))


class Rows(NamedTuple):
    """A batch of a model's inputs, (1, B, T) as `make_put` takes them."""

    tokens: Any
    segment_ids: Any
    positions: Any


class Options(NamedTuple):
    """How a model is looked at."""

    layers: tuple[int, ...]
    seq_len: int
    rows: int  # of a batch
    capacity_factor: float
    capacity_order: str


class Observed(NamedTuple):
    """Of one model and one domain, in numpy; of a batch, on the devices. Sums are over the tokens."""

    expert_NLC: Any  # best first
    gate_NLC: Any
    entropy_L: Any
    gap_L: Any  # of the largest logit and the second largest
    dropped_L: Any  # choices, if every batch had a capacity


def observe(
    model: Mixtral, tokens: Tokens, options: Options, mesh: jax.sharding.Mesh | None, advance: Callable[[int], None]
) -> Observed:
    """The choices of `model` for all tokens, the same on every process; call it under `jax.set_mesh(mesh)`."""
    share = index, count = batch_share(mesh, options.rows)
    put, own, size = make_put(mesh, share), options.rows // count, options.rows * options.seq_len
    numbered = Rows(tokens.ids_N, (tokens.document_N + 1).astype(np.int32), tokens.positions_N)
    found: list[Observed] = []
    for start in range(0, len(tokens.ids_N), size):
        n = min(size, len(tokens.ids_N) - start)
        flat = (np.pad(each[start : start + n], (0, size - n)) for each in numbered)
        rows = (each.reshape(1, options.rows, -1)[:, index * own : (index + 1) * own] for each in flat)
        batch = _observe(model, put(Rows(*rows)), options.capacity_factor, options.capacity_order)
        expert_MLC, gate_MLC, *sums_L = jax.device_get(batch)
        expert_MLC = expert_MLC.astype(np.uint16)
        shown = list(options.layers)
        found.append(Observed(expert_MLC[:n, shown], gate_MLC[:n, shown], *(each[shown] for each in sums_L)))
        advance(n)
    experts, gates, *sums = zip(*found, strict=True)
    return Observed(np.concatenate(experts), np.concatenate(gates), *(np.sum(each, 0, np.float64) for each in sums))


@partial(jax.jit, static_argnums=(2, 3))
def _observe(model: Mixtral, batch: Rows, capacity_factor: float, order: str) -> Observed:
    rows: Rows = jax.tree.map(operator.itemgetter(0), batch)
    routing = model.routing(rows.tokens, rows.positions, rows.segment_ids)
    whole = jax.tree.map(lambda x: _everywhere(x.reshape(-1, *x.shape[2:])), routing)
    valid_M = _everywhere(rows.segment_ids.reshape(-1)) > 0
    experts, top_k = whole.probs_ME.shape[-1], whole.expert_MC.shape[-1]
    capacity: Any = jnp.ceil(capacity_factor * jnp.sum(valid_M) * top_k / experts).astype(jnp.int32)

    def of_layer(own: Routing) -> tuple[jax.Array, ...]:
        wanted_MC = jnp.where(valid_M[:, None], own.expert_MC, experts)
        standing_MC = own.gate_MC if top_k > 1 else jnp.max(own.probs_ME, axis=-1, keepdims=True)
        taken_MC = limit_capacity(wanted_MC, standing_MC, experts, capacity, order)
        sums = router_stats(own, valid_M.astype(jnp.float32), taken_MC != wanted_MC)
        best, second = jnp.moveaxis(jax.lax.top_k(own.logits_ME, 2)[0], -1, 0)
        return sums.entropy_L, jnp.sum(valid_M * (best - second)), sums.dropped_L

    return Observed(whole.expert_MC, whole.gate_MC, *jax.vmap(of_layer, in_axes=1)(whole))


def _everywhere(x: jax.Array) -> jax.Array:
    """The same on every device."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P())
