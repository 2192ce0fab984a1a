"""Which mesh, micro-batch and rematerialisation: all that could be, pruned by arithmetic, the best ones compiled."""

from collections.abc import Iterator
from typing import NamedTuple

from mixtral_jax.train.config.schema import RunConfig
from mixtral_jax.train.plan import closed_form
from mixtral_jax.train.plan.chips import Topology, larger
from mixtral_jax.train.plan.roofline import Roofline, roofline

EXPERT_AXES = (1, 2, 4, 8)
CONTEXT_AXES = (1, 2, 4, 8, 16)
ROWS_PER_SHARD = (1, 2, 4, 8, 16, 32)
REMATS = ("minimal", "full")
# The closed form may be this much too low before a candidate is worth a compilation.
SLACK = 1.0


class Candidate(NamedTuple):
    """One way to run."""

    config: RunConfig
    memory: float  # bytes by closed form
    roofline: Roofline

    @property
    def seconds_per_token(self) -> float:
        """Of the whole machine, with half of the traffic hidden: between the two bounds."""
        r = self.roofline
        return (r.seconds + max(r.compute, r.memory) + r.network) / 2 / self.config.tokens_per_step

    @property
    def name(self) -> str:
        """For the table."""
        mesh = self.config.mesh
        axes = " x ".join(
            f"{a} {getattr(mesh, a)}" for a in ("data", "fsdp", "expert", "tensor", "context") if getattr(mesh, a) > 1
        )
        return f"{axes}, {self.config.micro_batch_size} sequences a micro-batch, remat {self.config.compute.remat}"


def candidates(config: RunConfig, topology: Topology) -> list[Candidate]:
    """All that the closed form lets fit, the fastest first; the global batch stays what the file says."""
    found = []
    for variant in _variants(config, topology):
        shape = closed_form.shape_of(variant, topology.chips)
        try:
            memory = sum(closed_form.memory(variant, shape).values())
        except ValueError:  # this mesh does not divide a matrix: blocks of a quantised base, for one
            continue
        if memory <= SLACK * topology.chip.usable:
            found.append(Candidate(variant, memory, estimate(variant, topology)))
    return sorted(found, key=lambda c: c.seconds_per_token)


def what_fits(config: RunConfig, topology: Topology) -> str:
    """Half a sentence: the fastest run that fits by closed form, here or on the smallest larger slice with any."""
    for there in (topology, *larger(topology)):
        found = candidates(config, there)
        if there is topology:  # the run itself was found not to fit, whatever the closed form says
            found = [c for c in found if _way(c.config, there) != _way(config, there)]
        if found:
            where = "" if there is topology else f"nothing fits {topology.name}; on {there.name} "
            return f"{where}this would, by closed form: {found[0].name}"
    return (
        f"nothing fits {topology.name} or larger slices of {topology.chip.name} with seq_len {config.seq_len} and "
        f"global_batch_size {config.global_batch_size}: take chips with more memory, a shorter seq_len, or a "
        "global_batch_size with more divisors"
    )


def _way(config: RunConfig, topology: Topology) -> tuple[dict[str, int], int, str]:
    return config.mesh.sizes(topology.chips), config.rows_per_micro_batch, config.compute.remat


def estimate(config: RunConfig, topology: Topology) -> Roofline:
    """The roofline of a run by closed form."""
    shape = closed_form.shape_of(config, topology.chips)
    flops = closed_form.flops(config, shape)
    return roofline(
        topology,
        flops=flops.total,
        useful=(flops.useful, flops.useful_full),
        memory_bytes=closed_form.memory_traffic(config, shape),
        sent=closed_form.traffic(config, shape),
        sizes=shape.sizes,
    )


def _variants(config: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    model, chips = config.model, topology.chips_per_slice
    for expert in EXPERT_AXES:
        for context in CONTEXT_AXES:
            if chips % (expert * context) or model.num_local_experts % expert or config.seq_len % (2 * context):
                continue
            fsdp = chips // expert // context
            if model.hidden_size % (fsdp * expert):
                continue
            for rows in ROWS_PER_SHARD:
                micro = rows * fsdp * expert * topology.slices
                if config.global_batch_size % micro:
                    continue
                for remat in REMATS:
                    yield _variant(config, topology, fsdp, expert, context, micro, remat)


def _variant(
    config: RunConfig, topology: Topology, fsdp: int, expert: int, context: int, micro: int, remat: str
) -> RunConfig:
    mesh = {"data": 1, "fsdp": fsdp, "expert": expert, "tensor": 1, "context": context, "dcn_data": topology.slices}
    return config.model_copy(
        update={
            "mesh": config.mesh.model_copy(update=mesh | {"dcn_fsdp": 1}),
            "micro_batch_size": micro,
            "compute": config.compute.model_copy(update={"remat": remat}),
        }
    )
