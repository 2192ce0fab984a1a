"""Attention, grouped matmul and SwiGLU: one function each, several back-ends, one meaning."""

from mixtral_jax.kernels.activation import grouped_down, swiglu
from mixtral_jax.kernels.attention import AttentionShape, Backend, attend, resolve_attention
from mixtral_jax.kernels.attention_tiled import Tokens
from mixtral_jax.kernels.grouped import grouped_matmul, resolve_matmul
from mixtral_jax.kernels.swiglu_blocked import Low, blocked_swiglu
