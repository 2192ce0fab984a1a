"""The sparse feed-forward: router, balance losses, dispatch, transport between devices, experts."""

from mixtral_jax.moe.balance import RouterStats, balance_loss, load_metrics, over_devices, router_stats, z_loss
from mixtral_jax.moe.block import OF_ALL_EXPERTS, ApplyExperts, MoeOutput, SparseMoe
from mixtral_jax.moe.dispatch import limit_capacity
from mixtral_jax.moe.experts import ExpertWeights, dense_swiglu
from mixtral_jax.moe.router import Routing
from mixtral_jax.moe.transport import Buffer, buffer_of, resolve_transport
