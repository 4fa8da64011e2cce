"""What a compiled program moves: read off its HLO text, loops counted as often as they turn.

`compiled.cost_analysis()` counts the body of a loop once, and a step is loops over layers and over
micro-batches, so the text is walked from the entry, multiplying by trip counts.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
"""Types whose name does not end in their number of bits, or that are packed."""
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "while",
    "conditional",
    "call",
    "partition-id",
    "iota",
    "async-start",
    "async-update",
}
"""What neither reads nor writes memory, or whose called computation is looked at instead."""
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: str
    rest: str
    root: bool

    def attribute(self, key: str) -> str:
        """The computation that an attribute names, or ""."""
        found = re.search(rf"\b{key}=\{{?%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one device in one run of the program."""

    memory: float
    """Every result outside of on-chip memory is written once and read once; arguments apart."""
    collectives: dict[str, float] = field(default_factory=dict)
    """Kind of collective → bytes that the device sends; between TPU slices is a kind of its own."""


BETWEEN_SLICES = "between slices"


class Module:
    """The computations of an HLO text."""

    def __init__(self, text: str):
        self.entry = ""
        self.computations: dict[str, list[Instruction]] = {}
        lines: list[Instruction] = []
        for line in text.splitlines():
            if line[:1] not in ("", " ", "}") and (found := _HEADER.match(line)):
                lines = self.computations[found[2]] = []
                self.entry = found[2] if found[1] else self.entry
            elif found := _NAME.match(line):
                lines.append(_instruction(found, line))

    def turns(self) -> Iterator[tuple[str, int]]:
        """Each computation outside of fusions, with the times that it runs."""
        counts: Counter[str] = Counter()
        self._visit(self.entry, 1, counts)
        yield from counts.items()

    def _visit(self, name: str, times: int, counts: Counter[str]) -> None:
        counts[name] += times
        for line in self.computations[name]:
            if line.opcode == "while":
                self._visit(line.attribute("body"), times * self.trips(line), counts)
            elif line.opcode == "call" or line.opcode == "async-start":
                called = line.attribute("to_apply") or line.attribute("calls")
                self._visit(called, times, counts)
            elif line.opcode == "conditional":
                branches = re.findall(r"%([\w.\-]+)", line.rest.split("branch_computations")[-1])
                for branch in set(branches) & self.computations.keys():
                    self._visit(branch, times, counts)

    def trips(self, loop: Instruction) -> int:
        """How often a loop turns: as XLA knows, or as its condition counts up to a constant."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        condition = self.computations[loop.attribute("condition")]
        limits = [
            int(line.operands)
            for line in condition
            if line.opcode == "constant" and re.fullmatch(r"\d+", line.operands)
        ]
        return max(limits, default=1)

    def traffic(self) -> Traffic:
        """Memory and collective bytes of a device."""
        memory, sent = 0.0, defaultdict[str, float](float)
        for name, times in self.turns():
            memory += times * sum(2 * self._written(name, line) for line in self.computations[name])
            seen = set()
            for line, scatter in self._inlined(name):
                # Asynchronous fusions repeat the collective that they overlap, under its channel.
                kind, volume = _sent(line, scatter)
                key = kind, line.attribute("channel_id") or line.name, volume
                if volume and key not in seen:
                    seen.add(key)
                    sent[kind] += times * volume
        return Traffic(memory, dict(sent))

    def largest(self, count: int) -> list[tuple[float, str, str]]:
        """The largest results: (bytes, shape, the operation of the source that they come from)."""
        found: dict[str, tuple[float, str, str]] = {}
        for name, _ in self.turns():
            for line in self.computations[name]:
                if line.opcode in FREE or line.opcode.endswith("-done"):
                    continue
                for kind, dims, _layout in _ARRAY.findall(line.shape):
                    shape = f"{kind}[{dims}]"
                    origin = re.search(r'op_name="([^"]*)"', line.rest)
                    found.setdefault(shape, (_size(kind, dims), shape, origin[1] if origin else ""))
        return sorted(found.values(), reverse=True)[:count]

    def _written(self, name: str, line: Instruction) -> float:
        if line.opcode in FREE or line.opcode.endswith("-done"):
            return 0.0
        writer, where, shape = line, self.computations[name], line.shape
        if line.opcode in ("fusion", "fusion-start"):
            where = self.computations[line.attribute("calls")]
            writer = next(inner for inner in where if inner.root)
        if line.opcode == "fusion-start":  # its own shape has the operands too
            shape = writer.shape
        if writer.opcode == "bitcast":
            made = (inner for inner in where if f"%{inner.name}" == writer.operands)
            writer = next(made, writer)
        if writer.opcode == "dynamic-update-slice":  # in place
            update = re.findall(r"%([\w.\-]+)", writer.operands)[1:2]
            return sum(_bytes(inner.shape) for inner in where if inner.name in update)
        return _bytes(shape, off_chip=True)

    def _inlined(self, name: str) -> Iterator[tuple[Instruction, bool]]:
        """The lines of a computation and of its fusions; whether the result is then scattered."""
        for line in self.computations[name]:
            yield line, False
            if line.opcode == "fusion":
                inner = line.attribute("calls")
                for below, scatter in self._inlined(inner):
                    yield below, scatter or inner.startswith("all-reduce-scatter")


def _instruction(found: re.Match[str], line: str) -> Instruction:
    start = found.end()
    # The layouts in a tuple have brackets and spaces too.
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    return Instruction(
        name=found[2],
        shape=line[start:end],
        opcode=line[end:opening].strip(),
        operands=line[opening + 1 : closing],
        rest=line[closing + 1 :],
        root=bool(found[1]),
    )


def _closing(line: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if not depth:
            return place
    return len(line)


def _bytes(shape: str, *, off_chip: bool = False) -> float:
    """Of all arrays of a shape; with `off_chip` without those in a TPU's on-chip memory, S(1)."""
    return sum(
        _size(kind, dims)
        for kind, dims, layout in _ARRAY.findall(shape)
        if not (off_chip and "S(" in layout)
    )


def _size(kind: str, dims: str) -> float:
    width = re.search(r"\d+", kind)
    each = BYTES.get(kind) or (int(width[0]) / 8 if width else 0)
    return each * prod(int(size) for size in dims.split(",") if size)


def _sent(line: Instruction, scatter: bool) -> tuple[str, float]:
    """(kind, bytes that a device sends) of one collective by rings; ("", 0) for other lines."""
    if line.opcode == "send" and "is_host_transfer=true" in line.rest:
        return BETWEEN_SLICES, _bytes(line.shape) - 4  # without the u32 of the context
    kind, started = line.opcode.removesuffix("-start"), line.opcode.endswith("-start")
    if kind not in COLLECTIVES:
        return "", 0.0
    size = _bytes(line.shape)
    if kind == "collective-permute":
        return kind, (size - 8) / 2 if started else size  # both ends and two u32
    n = group_size(line.rest)
    share = (n - 1) / n
    if kind == "all-gather":
        return kind, (size * n / (n + 1) if started else size) * share
    if kind == "reduce-scatter":
        return kind, (size / (n + 1) if started else size) * (n - 1)
    if kind == "all-reduce":
        return ("reduce-scatter", size * share) if scatter else (kind, 2 * size * share)
    return kind, size * share


def group_size(attributes: str) -> int:
    """Devices of one group, in any of the notations of HLO."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return prod(int(part or sizes[axis]) for axis, part in parts)
    return 1
