"""What a compiled program does, read from its text: matrix products, kernels and collectives, times the loops.

The compiler's own cost analysis counts a loop's body once and a Pallas kernel by what it declares. Here every
computation is weighted by the trip counts of the loops around it. On GPUs most products stand in fused computations,
and collectives may stand in computations of their own, which an async-start calls.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Passes over the other devices: a device sends (n - 1) / n of a collective's larger side in each. A permutation sends
# all of it, once.
PASSES = {
    "all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1, "ragged-all-to-all": 1,
    "collective-permute": 1,
}  # fmt: skip
PRODUCTS = ("dot", "convolution")
# Rows times matrices, and the matrices' gradient: megablox, tokamax.
GROUPED = ("gmm", "tgmm", "tokamax ragged_dot")
# Products of queries with keys, or of their size, in one call of a kernel, of which forward needs 2. Backward are 5, or
# 7 where dq and dk, dv are made by two kernels that each compute the scores and their gradient.
ATTENTION = {
    "splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4, "cudnn": 2, "cudnn backward": 5,
    "attention_forward": 2, "attention_dq": 3, "attention_dkv": 4,
}  # fmt: skip

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # the name of a dtype says its bits
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

Shape = tuple[int, ...]


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shape: str  # of the result, as text
    operands: tuple[str, ...]
    text: str  # everything behind the name


class Collective(NamedTuple):
    """A collective, or a chain of fusions that carry out one."""

    kind: str
    bytes: int  # of its larger side (input or output) on one device, once
    times: int  # loop trips
    groups: tuple[tuple[int, ...], ...]  # devices that take part together; () where the text does not list them
    asynchronous: bool
    shapes: tuple[Shape, ...]


class Program(NamedTuple):
    """The totals of a compiled program on one device."""

    dot_flops: float  # outside of loops of unknown length
    collectives: tuple[Collective, ...]
    kernels: Counter[str]  # name of a Pallas or cuDNN kernel -> calls
    grouped: Counter[Shape]  # (K, N) of one expert's matrix in a grouped matmul, of either direction -> calls
    unknown_loops: int  # loops of products whose trip count is not in the text; what is no product is counted once


def read_program(text: str) -> Program:
    """Parse the text of a compiled module (`compiled.as_text()`), for TPU, GPU or CPU."""
    computations = _computations(text)
    entry = next(re.finditer(r"^ENTRY %?([\w.\-]+)", text, re.M)).group(1)
    known, unknown_loops = _times(computations, entry, unknown_trips=0)
    times, _ = _times(computations, entry, unknown_trips=1)
    scattering = _reduce_scatters(computations)
    lines = (i for instructions in computations.values() for i in instructions)
    started = {called for i in lines if i.opcode == "async-start" for called in _called(i)}
    flops, kernels, grouped = 0.0, Counter[str](), Counter[Shape]()
    found: dict[tuple, Collective] = {}
    for name, instructions in computations.items():
        trips = times[name]
        if not trips:
            continue
        shapes = {i.name: i.shape for i in instructions}
        for i in instructions:
            if i.opcode in PRODUCTS or (kernel := _kernel(i)) == "cublas":
                flops += known[name] * dot_flops(i, shapes)
            elif kernel is not None:
                kernels[kernel] += trips
                if kernel in GROUPED:
                    grouped[_matrix(i, shapes)] += trips
            elif i.opcode.removesuffix("-start") in PASSES:
                collective = _collective(i, shapes, trips, scattered=name in scattering)
                collective = collective._replace(asynchronous=collective.asynchronous or name in started)
                found.setdefault(_identity(i, name, collective.kind), collective)
    return Program(flops, tuple(found.values()), kernels, grouped, unknown_loops)


def sent_by_axis(collectives: Sequence[Collective], mesh_shape: Mapping[str, int]) -> dict[tuple[str, str], float]:
    """(kind, mesh axes) -> bytes that one chip sends in a step."""
    total = defaultdict[tuple[str, str], float](float)
    for c in collectives:
        count = len(c.groups[0]) if c.groups else math.prod(mesh_shape.values())
        if count > 1:
            others = 1.0 if c.kind == "collective-permute" else (count - 1) / count
            total[c.kind, axes_of(c, mesh_shape)] += c.bytes * c.times * PASSES[c.kind] * others
    return dict(total)


def axes_of(c: Collective, mesh_shape: Mapping[str, int]) -> str:
    """The mesh axes along which the devices of a group differ, joined by +."""
    live = [a for a, n in mesh_shape.items() if n > 1]
    if not c.groups:
        return "+".join(live)
    places = np.array(np.unravel_index(np.array(c.groups[0]), tuple(mesh_shape.values())))
    varying = [a for a, row in zip(mesh_shape, places, strict=True) if len(set(row.tolist())) > 1]
    return "+".join(varying or live)


def _computations(text: str) -> dict[str, list[Instruction]]:
    """Name and lines of each. One ends where the next begins: kernels carry text with braces of its own."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            body = found[header.group(1)] = []
        elif match := _INSTRUCTION.match(line):
            body.append(_instruction(*match.groups()))
    return found


def _instruction(name: str, rest: str) -> Instruction:
    plain = " " + re.sub(r"\{[\d,]*(?::[^{}]*)?\}", "", rest)  # a layout, {1,0:T(8,128)}, has parentheses of no call
    match = _OPCODE.search(plain)
    if match is None:
        return Instruction(name, "", rest, (), rest)
    inside = plain[match.end() :].split(")", 1)[0]
    return Instruction(name, match.group(1), plain[: match.start()], tuple(re.findall(r"%([\w.\-]+)", inside)), rest)


def arrays(*shapes: str) -> list[tuple[int, Shape]]:
    """(bytes of a number, dimensions) of each array of some shapes."""
    found = [match for shape in shapes for match in _SHAPE.findall(shape)]
    return [(max(1, int(bits or 8) // 8), tuple(int(n) for n in dims.split(",") if n)) for _, bits, dims in found]


def dot_flops(i: Instruction, shapes: dict[str, str]) -> float:
    """2 m k n. On TPU a product is a convolution whose free dimensions may be spatial: k from the sizes alone."""
    (_, out), (_, left), (_, right) = (arrays(s)[0] for s in (i.shape, *(shapes[o] for o in i.operands[:2])))
    contracting = re.search(r'lhs_contracting_dim(?:s=\{|ensions"?:\[)([\d,"]*)[]}]', i.text)  # a dot, or cuBLAS
    if contracting:
        k = math.prod(left[int(d)] for d in contracting.group(1).replace('"', "").split(",") if d)
    else:
        k = round(math.sqrt(math.prod(left) * math.prod(right) / max(math.prod(out), 1)))
    return 2.0 * math.prod(out) * k


def _kernel(i: Instruction) -> str | None:
    """The kernel that a custom call is; None for anything else."""
    target = _TARGET.search(i.text) if i.opcode == "custom-call" else None
    if target is None:
        return None
    if target[1] == "tpu_custom_call":
        return kernel_name(i.name)
    if "cublas" in target[1]:
        return "cublas"
    if "fmha" in target[1]:
        return "cudnn backward" if target[1].endswith("Backward") else "cudnn"
    if "mosaic_gpu" not in target[1] and "triton" not in target[1]:
        return None
    path = (_OP_NAME.search(i.text) or ("", ""))[1]
    named = re.search(r"attention_(?:forward|dq|dkv)", i.name + i.text)
    return "tokamax ragged_dot" if "ragged" in path.lower() else named[0] if named else "pallas"


def kernel_name(instruction: str) -> str:
    """`gmm.66`, `transpose_jvp_jit_gmm___` -> `gmm`; `splash_mha_dq_segmented_no_residuals.9` -> `splash_mha_dq`."""
    instruction = re.sub(r"^transpose_jvp_jit_(\w+?)_*$", r"\1", instruction)
    return re.sub(r"(_segmented|_no_residuals|_residuals|[.\d])+$", "", instruction)


def _matrix(kernel: Instruction, shapes: dict[str, str]) -> Shape:
    """(K, N) of the matrices of a grouped matmul: the one array of three dimensions that it reads or writes."""
    sides = arrays(kernel.shape, *(shapes.get(o, "") for o in kernel.operands))
    return next(dims[1:] for _, dims in sides if len(dims) == 3)


def _times(computations: dict[str, list[Instruction]], entry: str, unknown_trips: int) -> tuple[Counter[str], int]:
    """How often each computation runs (loops of unknown length `unknown_trips` times); how many of those multiply."""
    times, unknown = Counter[str](), 0
    pending = [(entry, 1)]
    while pending:
        name, trips = pending.pop()
        times[name] += trips
        for i in computations.get(name, ()):
            inside, called = trips, [c for c in _called(i) if c in computations]
            if i.opcode == "while":
                length = _trip_count(i, computations)
                unknown += length is None and _multiplies(computations, called)
                inside *= unknown_trips if length is None else length or 1
            pending += [(c, inside) for c in called]
    return times, unknown


def _called(i: Instruction) -> set[str]:
    """Computations that an instruction runs; what was started is named by its end too."""
    if i.opcode.endswith(("-done", "-update")):
        return set()
    branches = [b.strip().lstrip("%") for found in _BRANCHES.findall(i.text) for b in found.split(",")]
    return {*_CALLED.findall(i.text), *branches}


def _multiplies(computations: dict[str, list[Instruction]], names: Sequence[str]) -> bool:
    """Whether there is a product in these computations, or in what they call."""
    body = [i for name in names for i in computations.get(name, ())]
    called = [c for i in body for c in _called(i)]
    return any(i.opcode in PRODUCTS for i in body) or (bool(called) and _multiplies(computations, called))


def _trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """From the loop's own note, or from a condition that compares a counter, from 0, with a constant."""
    if note := re.search(r'known_trip_count[^}]*"n":"(\d+)"', loop.text):
        return int(note.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    instructions = computations.get(condition.group(1), []) if condition else []
    constants = [int(n) for i in instructions for n in re.findall(r"s32\[\][^ ]* constant\((\d+)\)", i.text)]
    return constants[0] if len(constants) == 1 else None


def _reduce_scatters(computations: dict[str, list[Instruction]]) -> set[str]:
    """Computations of the TPU's fused all-reduce and slice, which send what a reduce-scatter sends."""
    fused = {name for name in computations if name.startswith("all-reduce-scatter")}
    for i in (i for instructions in computations.values() for i in instructions):
        if i.opcode == "fusion" and "AllReduceScatterFusion" in i.text:
            fused |= set(_CALLED.findall(i.text))
    return fused


def _collective(i: Instruction, shapes: dict[str, str], trips: int, *, scattered: bool) -> Collective:
    kind, started = i.opcode.removesuffix("-start"), i.opcode.endswith("-start")
    chained = "async_collective" in i.text or "chain_id" in i.text
    asynchronous = chained or (started and '"is_sync":true' not in i.text)
    own, given = arrays(i.shape), arrays(*(shapes.get(o, "") for o in i.operands))
    if kind == "ragged-all-to-all":  # rows, and the buffer for them: of both the one that is full on average
        own, given = given[:1], given[1:2]
    elif started and kind != "all-reduce" and len(own) > 1:  # operands, then results
        own = own[len(own) // 2 :]
    sides = [sum(size * math.prod(dims) for size, dims in side) for side in (own, given)]
    amount = min(sides) if kind == "ragged-all-to-all" else max(sides)
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    dimensions = tuple(dims for _, dims in (given if kind == "reduce-scatter" else own))
    return Collective(kind, amount, trips, _groups(i.text), asynchronous, dimensions)


def _identity(i: Instruction, computation: str, kind: str) -> tuple[str, str, str]:
    """The pieces of one asynchronous chain share a chain and a channel; all else stands for itself."""
    chain, channel = re.search(r'chain_id="(\d+)"', i.text), re.search(r"channel_id=(\d+)", i.text)
    return (kind, chain.group(1), channel.group(1)) if chain and channel else (kind, computation, i.name)


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """replica_groups as lists, in any of the three ways that XLA writes them."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return tuple(tuple(int(n) for n in g.split(",")) for g in re.findall(r"\{([\d,]+)\}", listed.group(1)))
    iota = re.search(r"replica_groups=(\[\d+,\d+\])<=(\[[\d,]+\])(?:T\(([\d,]+)\))?", text)
    if iota is None:
        return _groups_of_axes(text)
    rows, dims = (tuple(int(n) for n in part.strip("[]").split(",")) for part in iota.groups()[:2])
    ids = np.arange(math.prod(rows)).reshape(dims)
    ids = ids.transpose([int(n) for n in iota[3].split(",")]) if iota[3] else ids
    return tuple(map(tuple, ids.reshape(rows).tolist()))


def _groups_of_axes(text: str) -> tuple[tuple[int, ...], ...]:
    """`mesh['fsdp'=4,'expert'=2] {'fsdp'}`, as XLA writes since jax 0.12: the devices that differ along these axes."""
    found = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if found is None:
        return ()
    sizes = {name: int(size) for name, size in (axis.split("=") for axis in found[1].split(","))}
    chosen = [list(sizes).index(name) for name in found[2].split(",")]
    ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    ids = np.moveaxis(ids, chosen, range(-len(chosen), 0))
    return tuple(map(tuple, ids.reshape(-1, math.prod(ids.shape[-len(chosen) :])).tolist()))
