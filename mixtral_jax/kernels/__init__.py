"""Attention, grouped matmul and SwiGLU: one function each, several back-ends, one meaning."""

from mixtral_jax.kernels.activation import grouped_down, swiglu
from mixtral_jax.kernels.attention import attend
from mixtral_jax.kernels.attention_tiled import Tokens
from mixtral_jax.kernels.choice import AttentionShape, Backend, Choice, choose_attention, choose_kernels, choose_matmul
from mixtral_jax.kernels.grouped import grouped_matmul
from mixtral_jax.kernels.products import (
    bits,
    both_ways,
    from_bits,
    linear,
    narrowed,
    native_bf16,
    product,
    saved,
    transposed,
)
from mixtral_jax.kernels.swiglu_blocked import Low, blocked_swiglu
