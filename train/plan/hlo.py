"""What a compiled program does, read from its text: matrix products, kernels and collectives, times the loops.

The compiler's own cost analysis counts a loop's body once and a Pallas kernel by what it declares. Here every
computation is weighted by the trip counts of the loops around it.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)

GROUPED = ("gmm", "tgmm")  # megablox: rows times matrices, and the matrices' gradient

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


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
    times: float  # loop trips
    groups: tuple[tuple[int, ...], ...]  # devices that take part together; () where the text does not list them
    asynchronous: bool
    shapes: tuple[tuple[int, ...], ...]


class Program(NamedTuple):
    """The totals of a compiled program on one device."""

    dot_flops: float  # outside of loops of unknown length
    collectives: tuple[Collective, ...]
    kernels: Counter  # name of a Pallas kernel -> calls
    grouped: Counter  # (K, N) of one expert's matrix in a grouped matmul, of either direction -> calls
    unknown_loops: int  # loops whose trip count is not in the text; what is not a product is counted once


def read_program(text: str) -> Program:
    """Parse the text of a compiled module (`compiled.as_text()`), for TPU or CPU."""
    computations = dict(_computations(text))
    entry = next(re.finditer(r"^ENTRY %?([\w.\-]+)", text, re.M)).group(1)
    times, once, unknown = _times(computations, entry)
    scattering = _reduce_scatters(computations)
    flops, kernels, grouped = 0.0, Counter[str](), Counter[tuple[int, ...]]()
    found: dict[tuple, Collective] = {}
    for name, instructions in computations.items():
        trips = times.get(name, 0.0) + once.get(name, 0.0)
        if not trips:
            continue
        shapes = {i.name: i.shape for i in instructions}
        for i in instructions:
            if i.opcode in ("dot", "convolution"):
                flops += times.get(name, 0.0) * dot_flops(i, shapes)
            elif i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.text:
                kernels[kernel_name(i.name)] += round(trips)
                if kernel_name(i.name) in GROUPED:
                    grouped[_matrix(i, shapes)] += round(trips)
            elif i.opcode.removesuffix("-start") in COLLECTIVES:
                collective = _collective(i, shapes, trips, scattered=name in scattering)
                found.setdefault(_identity(i, name, collective), collective)
    return Program(flops, tuple(found.values()), kernels, grouped, unknown)


def _computations(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Name and lines of each. One ends where the next begins: kernels carry text with braces of its own."""
    name: str | None = None
    body: list[Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            if name is not None:
                yield name, body
            name, body = header.group(1), []
        elif name is not None and (match := _INSTRUCTION.match(line)):
            body.append(_instruction(*match.groups()))
    if name is not None:
        yield name, body


def _instruction(name: str, rest: str) -> Instruction:
    match = _OPCODE.search(" " + _hide_layouts(rest))
    if match is None:
        return Instruction(name, "", rest, (), rest)
    plain = " " + _hide_layouts(rest)
    inside = plain[match.end() :].split(")", 1)[0]
    return Instruction(name, match.group(1), plain[: match.start()], tuple(re.findall(r"%([\w.\-]+)", inside)), rest)


def _hide_layouts(text: str) -> str:
    """Layouts such as {1,0:T(8,128)} hold parentheses that are no calls."""
    return re.sub(r"\{[\d,]*(?::[^{}]*)?\}", "", text)


def sizes(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of each array of a shape."""
    return [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _SHAPE.findall(shape) if d in BYTES]


def dot_flops(i: Instruction, shapes: dict[str, str]) -> float:
    """2 m k n. On TPU a product is a convolution whose free dimensions may be spatial: k from the sizes alone."""
    (_, out), (_, left), (_, right) = (sizes(s)[0] for s in (i.shape, *(shapes[o] for o in i.operands[:2])))
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)
    if contracting:
        k = math.prod(left[int(d)] for d in contracting.group(1).split(",") if d)
    else:
        k = round(math.sqrt(math.prod(left) * math.prod(right) / max(math.prod(out), 1)))
    return 2.0 * math.prod(out) * k


def kernel_name(instruction: str) -> str:
    """`gmm.66` -> `gmm`, `splash_mha_dq_segmented_no_residuals.9` -> `splash_mha_dq`."""
    return re.sub(r"(_segmented|_no_residuals|_residuals|[.\d])+$", "", instruction)


def _matrix(kernel: Instruction, shapes: dict[str, str]) -> tuple[int, ...]:
    """(K, N) of the matrices of a grouped matmul: the one array of three dimensions that it reads or writes."""
    arrays = [*sizes(kernel.shape), *(s for o in kernel.operands for s in sizes(shapes.get(o, "")))]
    return next(dims[1:] for _, dims in arrays if len(dims) == 3)


def _times(computations: dict[str, list[Instruction]], entry: str) -> tuple[dict[str, float], dict[str, float], int]:
    """How often each computation runs, the same inside loops of unknown length taken as 1, and the number of those."""
    times: defaultdict[str, float] = defaultdict(float)
    once: defaultdict[str, float] = defaultdict(float)
    unknown = 0
    pending = [(entry, 1.0, True)]
    while pending:
        name, trips, known = pending.pop()
        (times if known else once)[name] += trips
        for i in computations.get(name, ()):
            inside, certain = trips, known
            if i.opcode == "while":
                length = _trip_count(i, computations)
                unknown += length is None
                inside, certain = trips * (length or 1), known and length is not None
            called = set(_CALLED.findall(i.text))
            for branches in _BRANCHES.findall(i.text):
                called |= {b.strip().lstrip("%") for b in branches.split(",")}
            pending += [(c, inside, certain) for c in called if c in computations]
    return times, once, unknown


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
    fused = set()
    for instructions in computations.values():
        for i in instructions:
            if i.opcode == "fusion" and "AllReduceScatterFusion" in i.text:
                fused |= set(_CALLED.findall(i.text))
    return fused | {name for name in computations if name.startswith("all-reduce-scatter")}


def _collective(i: Instruction, shapes: dict[str, str], trips: float, *, scattered: bool) -> Collective:
    kind = i.opcode.removesuffix("-start")
    asynchronous = i.opcode.endswith("-start") or "async_collective" in i.text or "chain_id" in i.text
    own, given = sizes(i.shape), [s for o in i.operands for s in sizes(shapes.get(o, ""))]
    if i.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        own = own[len(own) // 2 :] if len(own) > 1 else own
    amount = max(_bytes(own), _bytes(given))
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    dimensions = tuple(d for _, d in (own if kind != "reduce-scatter" else given))
    return Collective(kind, amount, trips, _groups(i.text), asynchronous, dimensions)


def _identity(i: Instruction, computation: str, c: Collective) -> tuple:
    """The pieces of one asynchronous chain share a chain and a channel; all else stands for itself."""
    chain = re.search(r'chain_id="(\d+)"', i.text)
    channel = re.search(r"channel_id=(\d+)", i.text)
    if chain and channel:
        return (c.kind, chain.group(1), channel.group(1))
    return (c.kind, computation, i.name)


def _bytes(arrays: list[tuple[str, tuple[int, ...]]]) -> int:
    return sum(BYTES[d] * math.prod(dims) for d, dims in arrays)


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """replica_groups as lists, in any of the three ways that XLA writes them."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return tuple(tuple(int(n) for n in g.split(",")) for g in re.findall(r"\{([\d,]+)\}", listed.group(1)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota is None:
        return _groups_of_axes(text)
    import numpy as np

    rows, columns, dims, order = iota.groups()
    ids = np.arange(int(rows) * int(columns)).reshape([int(n) for n in dims.split(",")])
    ids = ids.transpose([int(n) for n in order.split(",")]) if order else ids
    return tuple(tuple(int(x) for x in row) for row in ids.reshape(int(rows), int(columns)))


def _groups_of_axes(text: str) -> tuple[tuple[int, ...], ...]:
    """`mesh['fsdp'=4,'expert'=2] {'fsdp'}`, as XLA writes since jax 0.12: the devices that differ along these axes."""
    found = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if found is None:
        return ()
    import numpy as np

    sizes = {name: int(size) for name, size in (axis.split("=") for axis in found[1].split(","))}
    chosen = [list(sizes).index(name) for name in found[2].split(",")]
    ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    ids = np.moveaxis(ids, chosen, range(-len(chosen), 0))
    return tuple(map(tuple, ids.reshape(-1, math.prod(ids.shape[-len(chosen) :])).tolist()))
