"""Know before renting: whether and how fast a run goes on a machine that is not there, and where its bytes lie."""

from mixtral_jax.train.plan.chips import NODE_GPUS, Topology, parse_topology, peak_flops
from mixtral_jax.train.plan.closed_form import useful_flops, useful_per_token
from mixtral_jax.train.plan.compile import has_libtpu
from mixtral_jax.train.plan.gpus import has_cuda_plugin
from mixtral_jax.train.plan.placement import (
    axis_lines,
    human_bytes,
    memory_line,
    passing_line,
    placement_warnings,
    resident,
)
from mixtral_jax.train.plan.planner import best_plans, plan, run
from mixtral_jax.train.plan.report import mesh_text
