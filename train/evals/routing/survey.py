"""A model, and perhaps another one, over the documents of domains: the result of `routing`."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.data.progress import meter
from mixtral_jax.data.text import Tokenizer
from mixtral_jax.model import Mixtral
from mixtral_jax.train.evals.routing.observe import Observed, Options, Tokens, observe, tokens_of
from mixtral_jax.train.evals.routing.pieces import piece, pieces
from mixtral_jax.train.evals.routing.result import Coloured, Result
from mixtral_jax.train.evals.routing.tally import Tally, add, domain, tally
from mixtral_jax.train.evals.routing.together import Together, pairs_ratio, paths_ratio

_TEXTS, _TEXT_TOKENS = 3, 192  # of each domain, beginnings of documents that are shown
_LEAST_TOKENS = 16  # of a document that is shown, where there are such
Documents = Mapping[str, Sequence[np.ndarray]]  # token ids by domain


def measure(
    models: Sequence[Mixtral], documents: Documents, tokenizer: Tokenizer, options: Options, *,
    names: Sequence[str], asked: int, own_capacity: bool, mesh: jax.sharding.Mesh | None, show: bool = False,
) -> Result:  # fmt: skip
    """What the routers of a model do, and beside a second one what is not as in that.

    Args:
        models: one, or two of one shape and tokenizer.
        names: of them.
        asked: tokens of each domain, of which `documents` may have fewer.
        own_capacity: whether options.capacity_factor is the run's.
        show: a progress bar.
    """
    shape = models[0].config
    experts, top_k = shape.num_local_experts, shape.num_experts_per_tok
    together, sums, texts = Together(len(options.layers), experts, shape.vocab_size), dict[str, Tally](), []
    total = len(models) * sum(len(each) for own in documents.values() for each in own)
    with meter("Routing", total, show=show) as advance:
        for name, own in documents.items():
            tokens = tokens_of(own, options.seq_len)

            def say(size: int, name: str = name) -> None:
                advance(size, name)

            seen, *before = (observe(model, tokens, options, mesh, say) for model in models)
            sums[name] = tally(seen, tokens, experts, before[0] if before else None)
            together.add(seen, tokens)
            texts += _coloured(name, seen, tokens, tokenizer)
    return Result(
        checkpoint=names[0], against=names[1] if len(names) > 1 else None, experts=experts, top_k=top_k,
        model_layers=shape.num_hidden_layers, layers=options.layers, seq_len=options.seq_len, tokens_asked=asked,
        capacity_factor=options.capacity_factor, capacity_is_own=own_capacity,
        capacity_tokens=options.rows * options.seq_len,
        chance_first=1 / experts, chance_any=1 - math.comb(experts - top_k, top_k) / math.comb(experts, top_k),
        notes=tuple(_notes(models[0], sums, asked)),
        domains=tuple(domain(*each) for each in sums.items()), all=domain("all", functools.reduce(add, sums.values())),
        likings=together.likings(functools.partial(piece, tokenizer)),
        together_LEE=together.pairs_LEE, together_ratio_LEE=pairs_ratio(together.pairs_LEE),
        paths_LEE=together.paths_LEE, paths_ratio_LEE=paths_ratio(together.paths_LEE), texts=tuple(texts),
    )  # fmt: skip


def _coloured(name: str, seen: Observed, tokens: Tokens, tokenizer: Tokenizer) -> list[Coloured]:
    """The beginnings of the first documents that are long enough, or of the longest."""
    lengths = np.bincount(tokens.document_N)
    wanted = sorted(np.argsort(-np.minimum(lengths, _LEAST_TOKENS), kind="stable")[:_TEXTS])
    found = []
    for start, length in ((int(lengths[:d].sum()), int(lengths[d])) for d in wanted):
        at = slice(start, start + min(length, _TEXT_TOKENS))
        shown, control = pieces(tokenizer, tokens.ids_N[at].tolist())
        choices = (np.moveaxis(x[at], 1, 0) for x in (seen.expert_NLC, seen.gate_NLC.round(3)))
        found.append(Coloured(name, shown, control, *choices))
    return found


def _notes(model: Mixtral, sums: Mapping[str, Tally], asked: int) -> Iterator[str]:
    equal = int(np.sum(_copies(model)))
    if equal:
        yield (
            f"The experts of {equal} of {model.config.num_hidden_layers} layers are copies of one another (upcycled, "
            "and not trained since): whom the router chooses changes nothing there, and what is below is how a router "
            "that has learned nothing splits the tokens."
        )
    for name, own in sums.items():
        if own.choice.size < asked:
            yield f"{name} has {own.choice.size:,} tokens, fewer than the {asked:,} that were asked for."


@jax.jit
def _copies(model: Mixtral) -> jax.Array:
    """(L,) bool: whether all experts of a layer have the same matrices."""
    leaves = [x[...] for x in jax.tree.leaves(model.layers.moe, is_leaf=lambda x: isinstance(x, nnx.Param))]
    stacks = [x for x in leaves if x.ndim > 3]
    return jnp.stack([jnp.all(x == x[:, :1], axis=range(1, x.ndim)) for x in stacks]).all(0)
