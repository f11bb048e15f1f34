"""Reads collectives, cycles and kernels from the text of a compiled program.

XLA's cost analysis counts the body of a loop only once, and it does not report collectives. This
module counts an instruction in a loop once for each iteration.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from mobilellm_jax.errors import UserError

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:called_computations|branch_computations)=\{([^}]*)\}"
)
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"^s32\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Several fusions may share one transfer. All of these fusions have the same chain_id or name.
_SAME_TRANSFER = re.compile(r'(?:chain_id|async_collective_name)="([^"]*)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# XLA writes groups of devices as lists, as a number and a size, or as axes of a mesh.
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})"
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    text: str  # Part of the line after " = ".


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices."""

    kind: str
    shape: str  # Types and sizes of the arrays, without memory layouts.
    payload_bytes: int  # Bytes of the result on one device; for a reduce-scatter, of its operand.
    group: int  # Number of devices that exchange data with each other.
    times: int  # Number of transfers per execution of the program.
    origin: str  # Name of the operation in the source program.

    @property
    def wire_bytes(self) -> int:
        """The smallest number of bytes that a device sends per execution, with ring algorithms."""
        rounds = 2 if self.kind == "all-reduce" else 1
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return round(rounds * share * self.payload_bytes) * self.times


@dataclasses.dataclass(frozen=True)
class Program:
    """The operations in one execution of a compiled program."""

    collectives: tuple[Collective, ...]
    estimated_cycles: int | None  # Estimate of the TPU compiler, without Pallas kernels.
    kernels: dict[str, int]  # Number of calls of each Pallas kernel per execution.
    unknown_loops: int  # Number of loops of unknown length, whose bodies count once.


def read_program(text: str) -> Program:
    """Reads the text of a compiled program (`jax.stages.Compiled.as_text`)."""
    computations, entry = _computations(text)
    collectives: dict[tuple[str, str], Collective] = {}
    kernels: collections.Counter[str] = collections.Counter()
    cycles: int | None = None
    unknown = 0
    for instruction, times, in_fusion in _executed(computations, entry):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            transfer = _SAME_TRANSFER.search(instruction.text)
            key = (kind, transfer.group(1) if transfer else instruction.name)
            collectives.setdefault(key, _collective(kind, instruction, times))
        if 'custom_call_target="tpu_custom_call"' in instruction.text:
            kernels[re.sub(r"[.\d]+$", "", instruction.name)] += times
        estimate = _CYCLES.search(instruction.text)
        if estimate and not in_fusion:
            cycles = (cycles or 0) + int(estimate.group(1)) * times
        unknown += instruction.opcode == "while" and _trips(instruction, computations) is None
    return Program(tuple(collectives.values()), cycles, dict(kernels), unknown)


def _executed(
    computations: dict[str, list[Instruction]], name: str, times: int = 1, in_fusion: bool = False
) -> Iterator[tuple[Instruction, int, bool]]:
    """Yields each instruction, how often it runs, and whether it is part of a fusion."""
    for instruction in computations[name]:
        yield instruction, times, in_fusion
        trips = _trips(instruction, computations) if instruction.opcode == "while" else 1
        inside = in_fusion or instruction.opcode == "fusion"
        for called in _called(instruction):
            yield from _executed(
                computations, called, times * (1 if trips is None else trips), inside
            )


def _array_bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype)
    if bits is None:
        bits = int(re.sub(r"^\D+(\d+).*$", r"\1", dtype))
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, rest = found.groups()
            opcode = _OPCODE.search(rest)
            if opcode:
                shape = rest[: opcode.start()]
                current.append(Instruction(name, shape, opcode.group(1), rest))
    if not entry:
        raise UserError("The text is not an HLO module: it has no ENTRY computation.")
    return computations, entry


def _called(instruction: Instruction) -> Iterator[str]:
    """Yields the computations that the instruction calls, except the function of a reduction."""
    if instruction.opcode not in ("while", "fusion", "call", "conditional", "async-start"):
        return
    for one, several in _CALLED.findall(instruction.text):
        yield from re.findall(r"[\w.\-]+", one or several)


def _trips(instruction: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    known = _KNOWN_TRIPS.search(instruction.text)
    if known:
        return int(known.group(1))
    condition = _CONDITION.search(instruction.text)
    if condition is None:
        return None
    # The loop condition of a scan has one constant, which is the number of iterations.
    body = computations[condition.group(1)]
    constants = [m.group(1) for i in body if (m := _CONSTANT.match(i.text))]
    return int(constants[0]) if len(constants) == 1 else None


def _collective(kind: str, instruction: Instruction, times: int) -> Collective:
    arrays = _ARRAY.findall(instruction.shape)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # The shape lists the operands, then the results, and then counters of the transfer (u32).
        arrays = [a for a in arrays if a != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    group = _group_size(instruction.text)
    payload = sum(_array_bytes(*array) for array in arrays)
    if kind == "reduce-scatter":
        payload *= group
    origin = _OP_NAME.search(instruction.text)
    return Collective(
        kind=kind,
        shape=", ".join(f"{dtype}[{dims}]" for dtype, dims in arrays),
        payload_bytes=payload,
        group=group,
        times=times,
        origin=origin.group(1) if origin else "",
    )


def _group_size(text: str) -> int:
    found = _GROUPS.search(text)
    if found is None:
        return 1
    listed, counted, mesh, axes = found.groups()
    if listed is not None:
        return len(listed.split(","))
    if counted is not None:
        return int(counted)
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))
