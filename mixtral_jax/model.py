"""Mixtral: embed -> stacked, scanned, rematerialised blocks -> norm -> head."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.attention import Attend, Attention, attend_row
from mixtral_jax.config import ComputeConfig, MixtralConfig
from mixtral_jax.inputs import NO_ROUTER, Choices, Tokens_BT, as_ids, chosen_experts, fill_rows
from mixtral_jax.kernels import Tokens
from mixtral_jax.layers import Embedding, Head, RMSNorm, rope_angles
from mixtral_jax.lora import LoraConfig, base_dtype
from mixtral_jax.losses import CrossEntropy, linear_cross_entropy, linear_logps
from mixtral_jax.moe import ApplyExperts, MoeOutput, RouterStats, Routing, SparseMoe, over_devices
from mixtral_jax.parallel import (
    BATCH_AXES,
    TOKEN_AXES,
    batch_spec,
    drop_padding,
    gather,
    platform,
    psum,
    shard_key,
    sharded,
)

# What the backward pass of a layer finds saved; the rest it computes again. The routing is saved by all of them, the
# gathered weights by `none` alone. `minimal` recomputes no large matmul: norms, activations and gathers only. Where the
# experts work on some tokens at a time (moe.chunk_tokens), of them nothing is saved but the routing.
ATTENTION = ("query", "key", "value", "attended", "attention_output")
SAVED: dict[str, tuple[str, ...]] = {
    "minimal": ("route", *ATTENTION, "expert_hidden"),
    "attention": ("route", *ATTENTION),
    "experts_input": ("route", "expert_input"),
    "offload": ("route",),  # and what `attention` saves in the memory of the host
    "full": ("route",),
}


def saving(remat: str) -> Callable[..., Any]:
    """The policy of a ComputeConfig.remat. What has no memory of its own, a CPU, keeps in place what it would move."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return policies.save_anything_except_these_names("weights")
    if remat == "offload" and platform() == "cpu":
        remat = "attention"
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=SAVED[remat],
            names_which_can_be_offloaded=ATTENTION,
            offload_src="device",
            offload_dst="pinned_host",
        )
    return policies.save_only_these_names(*SAVED[remat])


def compute_dtype(dtype: str) -> jnp.dtype:
    """The dtype that a ComputeConfig.dtype stands for on this machine."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(dtype)


def reduce_dtype(compute: ComputeConfig) -> jnp.dtype:
    """Of gradients that are summed over devices: never less than the compute dtype."""
    return jnp.promote_types(compute.reduce_dtype, compute_dtype(compute.dtype))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(
        self,
        config: MixtralConfig,
        compute: ComputeConfig,
        *,
        key: jax.Array,
        stack: tuple[int, ...],
        dtype: jnp.dtype,
        lora: LoraConfig | None = None,
    ):
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, stack=stack, dtype=dtype)
        attention_key, moe_key = jax.random.split(key)
        self.attention_norm = norm()
        self.attention = Attention(config, key=attention_key, stack=stack, dtype=dtype, lora=lora)
        self.moe_norm = norm()
        self.moe = SparseMoe(config, compute.moe, key=moe_key, stack=stack, dtype=dtype, lora=lora)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angles_BTh: Float[Array, "B T half"],
        segments_BT: Int[Array, "B T"],
        attend: Attend,
        *,
        rng: jax.Array | None = None,
        apply_experts: ApplyExperts | None = None,
        chosen_MC: Int[Array, "M C"] | None = None,
    ) -> tuple[Any, MoeOutput]:
        """What `attend` kept, and the layer's output, with what became of its tokens.

        `attend`, `apply_experts`: how queries meet keys, and tokens experts; `rng`: of adapter dropout; `chosen`: the
        experts to take in place of the router's choices.
        """
        y_BTD, kept = self.attention(self.attention_norm(x_BTD), angles_BTh, attend, rng)
        x_BTD = x_BTD + y_BTD
        out = self.moe(self.moe_norm(x_BTD), segments_BT > 0, rng, apply_experts, chosen_MC)
        return kept, out._replace(y_BTD=x_BTD + out.y_BTD)


# (block, x, carry, this layer's input) -> (x, carry, this layer's output)
Layer = Callable[[Block, jax.Array, Any, Any], tuple[jax.Array, Any, Any]]


class Noise(NamedTuple):
    """What training may add at random; without it the model is a function of its inputs."""

    rng: jax.Array
    embedding: float = 0.0  # NEFTune's alpha


def perturb(x_BTD: Float[Array, "B T D"], noise: Noise, segments_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """x + uniform(-1, 1) * alpha / sqrt(T D), T the tokens of the row that are not padding (NEFTune 2310.05914)."""
    tokens_B = psum(jnp.sum(segments_BT > 0, axis=1), ("context",))
    bound_B = noise.embedding / jnp.sqrt(jnp.maximum(tokens_B, 1) * x_BTD.shape[-1])
    rng = shard_key(jax.random.fold_in(noise.rng, 1), TOKEN_AXES)
    uniform_BTD = jax.random.uniform(rng, x_BTD.shape, jnp.float32, -1, 1)
    return x_BTD + (uniform_BTD * bound_B[:, None, None]).astype(x_BTD.dtype)


class Mixtral(nnx.Module):
    """The model. Parameters are stored in `param_dtype`; the maths runs in compute.dtype.

    Under `jax.set_mesh(mesh)` the same calls run on the whole mesh: (B, T) is split over data x fsdp x expert and
    context, which must divide it.
    """

    def __init__(
        self,
        config: MixtralConfig,
        compute: ComputeConfig = ComputeConfig(),  # noqa: B008 - frozen
        *,
        key: jax.Array,
        param_dtype: jnp.dtype = jnp.float32,
        lora: LoraConfig | None = None,
    ):
        self.config, self.compute = config, compute
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        size, std = (config.vocab_size, config.hidden_size), config.initializer_range
        whole = () if lora is None else lora.whole
        matrices, dtype = ("embed.weight", "head.weight"), base_dtype(lora, param_dtype)
        held = {name: param_dtype if name in whole else dtype for name in matrices}
        self.embed = Embedding(*size, std, key=embed_key, dtype=param_dtype, held=held["embed.weight"])
        stack = (config.num_hidden_layers,)
        self.layers = Block(config, compute, key=layers_key, stack=stack, dtype=param_dtype, lora=lora)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=param_dtype)
        if not config.tie_word_embeddings:
            self.head = Head(*size[::-1], std, key=head_key, dtype=param_dtype, held=held["head.weight"])
        for _, leaf in nnx.iter_graph(self):
            if isinstance(leaf, nnx.Param) and "reduce_dtype" not in leaf.get_metadata():
                leaf.set_metadata(reduce_dtype=reduce_dtype(compute).name)  # for `gather` and `sum_replicas`

    def __call__(
        self,
        tokens: Tokens_BT,
        positions: Tokens_BT | None = None,
        segment_ids: Tokens_BT | None = None,
        *,
        routing: Choices | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits, fp32. Compiled once for each shape. Nothing is dropped: a capacity is for training.

        Args:
            tokens: token ids (B, T): an array, or a list of rows of one length.
            positions: place of each token in its document; counts from 0 if not given.
            segment_ids: document of each token, 0 for padding; one document if not given. A document's tokens are
                neighbours, in order.
            routing: the experts that every layer takes for each token, in place of its router's choices: what
                `routing` gave, or indices (B, T, L, k). The gates still come of this model's own logits.

        Raises:
            ValueError: rows of different lengths, what are no rows of integers, or a routing of another shape.
        """
        rows = self._rows(tokens, positions, segment_ids)
        return _logits(self.dropless(), *rows, *chosen_experts(routing, self.config, rows[0]))

    def routing(
        self, tokens: Tokens_BT, positions: Tokens_BT | None = None, segment_ids: Tokens_BT | None = None
    ) -> Routing:
        """What every router decides: the fields of Routing with (B, T, L) in place of M.

        Raises:
            ValueError: a dense model, which has none; what `__call__` refuses.
        """
        if self.config.is_dense:
            raise ValueError(NO_ROUTER)
        return _routing(self.dropless(), *self._rows(tokens, positions, segment_ids))

    def dropless(self, **changes: Any) -> Self:
        """The same model, its expert blocks without a capacity and with other `changes` of their options."""
        model = nnx.merge(*nnx.split(self))
        model.layers.moe.options = self.layers.moe.options.model_copy(update={"capacity_factor": None, **changes})
        return model

    def _rows(self, *rows: Tokens_BT | None) -> tuple[Any, ...]:
        names = ("tokens", "positions", "segment_ids")
        limits = (self.config.vocab_size, 2**31, 2**31)
        return tuple(as_ids(*each) for each in zip(rows, names, limits, strict=True))

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        noise: Noise | None = None,
        chosen_BTLC: Int[Array, "B T L C"] | None = None,
        collect: Callable[[MoeOutput], Any] = lambda out: out.stats,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """This device's last hidden states after the final norm, and what is collected of each layer, stacked.

        By default that is the router statistics. `chosen`: the experts to take in place of the routers' choices.
        """
        angles_BTh = self.angles(positions_BT)
        attend = attend_row(Tokens(positions_BT, segments_BT), self.config.sliding_window, self.compute.attention)
        layers = self.config.num_hidden_layers
        rngs_L = None if noise is None else jax.random.split(noise.rng, layers)
        chosen_LMC = None
        if chosen_BTLC is not None:
            chosen_LMC = jnp.moveaxis(chosen_BTLC.reshape(-1, layers, chosen_BTLC.shape[-1]), 1, 0)

        def layer(block: Block, x_BTD: jax.Array, _: None, given: Any) -> tuple[jax.Array, None, Any]:
            rng, chosen_MC = given
            _, out = block(x_BTD, angles_BTh, segments_BT, attend, rng=rng, chosen_MC=chosen_MC)
            return out.y_BTD, None, collect(out)

        x_BTD = self.embedded(tokens_BT)
        if noise is not None and noise.embedding:
            x_BTD = perturb(x_BTD, noise, segments_BT)
        x_BTD, _, collected = self.run(x_BTD, layer, inputs=(rngs_L, chosen_LMC))
        return self.norm(x_BTD), collected

    def run(
        self, x_BTD: Float[Array, "B T D"], layer: Layer, carry: Any = None, inputs: Any = None
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """The loop over the layers: for training, for prompts and for single tokens, which differ in their `layer`.

        `carry` goes from layer to layer beside x. `inputs` and what comes back as the third are by layer.
        """

        def body(held: tuple[jax.Array, Any], own: tuple[Block, Any]) -> tuple[tuple[jax.Array, Any], Any]:
            (x_BTD, carry), (block, given) = held, own
            x_BTD, carry, out = layer(block, x_BTD, carry, given)
            return (x_BTD, carry), out

        body = jax.checkpoint(body, policy=saving(self.compute.remat), prevent_cse=False)
        (x_BTD, carry), outputs = jax.lax.scan(body, (x_BTD, carry), (self.layers, inputs))
        return x_BTD, carry, outputs

    def embedded(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The embeddings of tokens, in the compute dtype."""
        return self.embed(tokens_BT, compute_dtype(self.compute.dtype))

    def angles(self, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T half"]:
        """Rotary angles of positions."""
        return rope_angles(positions_BT, self.config.head_dim, self.config.rope_theta)

    def head_weight(self) -> Float[Array, "D V"]:
        """The output matrix in the compute dtype: this device's shard of the vocabulary."""
        dtype = compute_dtype(self.compute.dtype)
        if self.config.tie_word_embeddings:
            return gather(self.embed.weight, dtype).T
        return gather(self.head.weight, dtype)


@jax.jit
def _logits(
    model: Mixtral,
    tokens_BT: jax.Array,
    positions: jax.Array | None,
    segments: jax.Array | None,
    *chosen: jax.Array,
) -> Float[Array, "B T V"]:
    def local(model: Mixtral, tokens: jax.Array, positions: jax.Array, segments: jax.Array, *chosen) -> jax.Array:
        x_BTD, _ = model.hidden(tokens, positions, segments, None, *chosen)
        return jnp.dot(x_BTD, model.head_weight(), preferred_element_type=jnp.float32)

    rows = (*fill_rows(tokens_BT, positions, segments), *chosen)
    logits_BTV = sharded(local, model, rows, (batch_spec(),) * len(rows), P(BATCH_AXES, "context", "tensor"))
    return drop_padding(logits_BTV, model.config.vocab_size)


@jax.jit
def _routing(model: Mixtral, tokens_BT: jax.Array, positions: jax.Array | None, segments: jax.Array | None) -> Routing:
    def local(model: Mixtral, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> Routing:
        _, routing = model.hidden(tokens, positions, segments, collect=lambda out: out.routing)
        return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(*tokens.shape, -1, a.shape[-1]), routing)

    rows = fill_rows(tokens_BT, positions, segments)
    return sharded(local, model, rows, (batch_spec(),) * 3, batch_spec())


def next_token_sums(
    model: Mixtral,
    tokens_BT: Int[Array, "B T"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    noise: Noise | None = None,
    *,
    routing: Choices | None = None,
    entropy: bool = False,
    skip_masked: bool = False,
) -> tuple[CrossEntropy, RouterStats]:
    """Weighted sums of the next-token cross-entropy, and router statistics, over the tokens of all devices.

    `routing`: see Mixtral.__call__; `entropy`, `skip_masked`: see linear_cross_entropy.
    """

    def score(x_MD: jax.Array, head_DV: jax.Array, targets: jax.Array, weights: jax.Array) -> CrossEntropy:
        sums = linear_cross_entropy(
            x_MD, head_DV, targets.reshape(-1), weights.reshape(-1),
            chunk=model.compute.loss_chunk, entropy=entropy, vocab=model.config.vocab_size, skip_masked=skip_masked,
        )  # fmt: skip
        return psum(sums, TOKEN_AXES)

    rows = (tokens_BT, targets_BT, weights_BT, positions_BT, segments_BT)
    return _scored(model, score, rows, noise, routing, P())


def target_logps(
    model: Mixtral,
    tokens_BT: Int[Array, "B T"],
    targets_BT: Int[Array, "B T"],
    wanted_BT: Bool[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    noise: Noise | None = None,
    *,
    routing: Choices | None = None,
) -> tuple[Float[Array, "B T"], RouterStats]:
    """log p(target) at every wanted position and 0 at the others, fp32, and the router statistics.

    `routing`: see Mixtral.__call__.
    """

    def score(x_MD: jax.Array, head_DV: jax.Array, targets: jax.Array, wanted: jax.Array) -> jax.Array:
        scores = linear_logps(
            x_MD, head_DV, targets.reshape(-1), wanted.reshape(-1),
            chunk=model.compute.loss_chunk, vocab=model.config.vocab_size,
        )  # fmt: skip
        return scores.logp_M.reshape(targets.shape)

    rows = (tokens_BT, targets_BT, wanted_BT, positions_BT, segments_BT)
    return _scored(model, score, rows, noise, routing, batch_spec())


def _scored(
    model: Mixtral,
    score: Callable[..., Any],
    rows: tuple[jax.Array, ...],
    noise: Noise | None,
    routing: Choices | None,
    out_spec: P,
) -> tuple[Any, RouterStats]:
    """score(last hidden states, head, targets, weights) on every device's share of the rows, and the statistics."""

    def local(model: Mixtral, rng, tokens, targets, weights, positions, segments, *chosen) -> tuple[Any, RouterStats]:
        own = None if noise is None else noise._replace(rng=rng)  # as this device received it
        x_BTD, stats = model.hidden(tokens, positions, segments, own, *chosen)
        return score(x_BTD.reshape(-1, x_BTD.shape[-1]), model.head_weight(), targets, weights), over_devices(stats)

    rows = (*rows, *chosen_experts(routing, model.config, rows[0]))
    args = (None if noise is None else noise.rng, *rows)
    return sharded(local, model, args, (P(), *(batch_spec(),) * len(rows)), (out_spec, P()))


def abstract_model(
    config: MixtralConfig,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008 - frozen
    param_dtype: Any = jnp.float32,
    lora: LoraConfig | None = None,
) -> Mixtral:
    """The model with shapes in place of arrays: nothing is allocated."""
    make = partial(Mixtral, config, compute, param_dtype=param_dtype, lora=lora)
    return nnx.eval_shape(lambda: make(key=jax.random.key(0)))
