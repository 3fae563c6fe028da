"""Reads the collectives, with their sizes, groups and loops, from the text of a compiled program (optimised HLO)."""

import dataclasses
import math
import re
from typing import Any

import numpy as np

_BITS = {"pred": 8, "bf16": 16}
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective instruction: `payload` is the bytes of the whole array, in a group of devices."""

    kind: str
    payload: int
    dtype: str              # of most of its bytes
    group: tuple[int, ...]  # the first group: places in the mesh, flattened
    hidden: bool            # runs beside other work
    times: int              # a step, more than once inside a loop
    source: str             # the operation of the model that it comes from


def collectives(hlo: str, num_devices: int) -> list[Collective]:
    """Reads the collectives from the text of an optimised HLO module; loops of unknown length count once.

    TPU compilers run a collective in pieces beside fused computations of other parts of the program, a loop's body
    among them: the instructions of a chain are one collective, as often as the least of them.
    """
    bodies = _computations(hlo)
    times = {name: count for name, (count, _) in _runs(bodies).items()}
    hidden = {name for lines in bodies.values() for line in lines if " async-start(" in line
              for name in _called(line)}
    found: dict[Any, Collective] = {}
    for name, lines in bodies.items():
        for line in lines:
            if (match := _COLLECTIVE.search(line)) and times.get(name):
                result, kind, start = match.groups()
                group = _first_group(line, num_devices)
                if len(group) < 2:
                    continue
                sizes = {dtype: 0 for dtype, _ in _SHAPE.findall(result)}
                for dtype, dims in _SHAPE.findall(result):
                    sizes[dtype] += math.prod(map(int, filter(None, dims.split(",")))) * _bits(dtype) // 8
                payload = sum(sizes.values())
                if start and kind == "all-gather":           # a tuple of operands and results
                    payload = payload * len(group) // (len(group) + 1)
                elif start and kind in ("all-to-all", "collective-permute"):
                    payload //= 2
                elif kind == "reduce-scatter":               # the result is a share of the array
                    payload *= len(group)
                source = re.search(r'op_name="([^"]*)"', line)
                chain = re.search(r"channel_id=(\d+).*chain_id=", line)
                key = (kind, chain[1]) if chain else len(found)
                again = found.get(key)
                found[key] = Collective(kind, payload, max(sizes, key=sizes.get), group,
                                        bool(start or again) or name in hidden,
                                        min(times[name], again.times if again else math.inf),
                                        source[1] if source else "")
    return list(found.values())


def _bits(dtype: str) -> int:
    return _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])


def _computations(hlo: str) -> dict[str, list[str]]:
    """Splits the module into {computation: lines}; the entry is named ""."""
    bodies, lines = {}, []
    for line in hlo.splitlines():
        if line.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
            lines = bodies.setdefault("" if match[1] else match[2], [])
        elif line.startswith(" "):
            lines.append(line)
    return bodies


def _called(line: str) -> list[str]:
    return [name for names in re.findall(r"\b(?:calls|to_apply|body|condition|\w*computations?)="
                                         r"(\{[^}]*\}|%[\w.\-]+)", line) for name in re.findall(r"%([\w.\-]+)", names)]


def _runs(bodies: dict[str, list[str]]) -> dict[str, tuple[int, int]]:
    """How often each computation runs in a step, and the length of the innermost loop around it (1: none)."""
    runs: dict[str, tuple[int, int]] = {}

    def visit(name: str, count: int, turns: int) -> None:
        runs[name] = (runs.get(name, (0, 1))[0] + count, turns)
        for line in bodies.get(name, ()):
            length = _trip_count(line, bodies) if " while(" in line else 0
            for callee in _called(line):
                visit(callee, count * (length or 1), length or turns)

    visit("", 1, 1)
    return runs


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition, body = (bodies.get(re.search(rf"{name}=%([\w.\-]+)", line)[1], []) for name in ("condition", "body"))
    limits = [int(n) for text in condition for n in re.findall(r"constant\((\d+)\)", text)]
    return -(-max(limits, default=1) // _step(condition, body))


def _step(condition: list[str], body: list[str]) -> int:
    """What a turn adds to the counter, the element of the loop's state that the condition looks at; 1 if unclear."""
    index = re.search(r"get-tuple-element\(.*?\), index=(\d+)", "".join(condition))
    root = next((text for text in body if "ROOT " in text and " tuple(" in text), None)
    if not index or not root:
        return 1
    counter = re.findall(r"%([\w.\-]+)", root.partition(" tuple(")[2])[int(index[1])]
    sums = [text for text in body if f"%{counter} = " in text and " add(" in text]
    for operand in re.findall(r"%([\w.\-]+)", sums[0].partition(" add(")[2].partition(")")[0]) if sums else ():
        for text in body:
            if f"%{operand} = " in text and (step := re.search(r"constant\((\d+)\)", text)):
                return int(step[1])
    return 1


def _first_group(line: str, num_devices: int) -> tuple[int, ...]:
    if match := _GROUPS.search(line):       # [groups, size] <= [iota] T(permutation)
        ids = np.arange(math.prod(dims := _ints(match[3]))).reshape(dims)
        ids = ids.transpose(_ints(match[4])) if match[4] else ids
        return tuple(int(i) for i in ids.reshape(int(match[1]), int(match[2]))[0])
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        return tuple(_ints(match[1]))
    return tuple(range(num_devices))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


# What moves no data itself, or was counted where it started.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all",
         "partition-id", "iota", "custom-call"}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:,|$)")


def traffic(hlo: str) -> float:
    """Bytes that the program reads from and writes to a TPU's main memory in a step, loops counted in full.

    Every instruction outside of fusions reads its operands and writes its result, unless they lie in vector memory
    (S(1) in their layout). Within a loop of n turns, an array of n slices is read or written a slice at a time. The
    compiler's own figure ("bytes accessed") counts the body of a loop once.
    """
    bodies = _computations(hlo)
    fused = {name for lines in bodies.values() for line in lines if " while(" not in line for name in _called(line)}
    total = 0.0
    for name, (count, turns) in _runs(bodies).items():
        if name in fused:
            continue
        results: dict[str, list[float]] = {}
        for line in bodies.get(name, ()):
            if not (match := _INSTRUCTION.match(line)):
                continue
            results[match[1]] = sizes = _in_hbm(match[2], turns)
            if match[3] in _FREE or match[3].endswith("-done"):
                continue
            operands = [size for operand in re.findall(r"%([\w.\-]+)", match[4]) for size in results.get(operand, ())]
            if "dynamic-update-slice" in match[1]:    # writes in place: what it updates is not read
                operands = [size for size in operands if size not in sizes]
            if match[3].endswith("-start"):    # a copy or slice into vector memory: what arrives was read once
                total += count * min(_in_hbm(match[2].replace("S(1)", ""), turns), default=0.0)
            else:
                total += count * (sum(sizes) + sum(operands))
    return total


def _in_hbm(result: str, turns: int) -> list[float]:
    """Bytes of each array of a result that lies in main memory, those a loop steps through divided by its turns."""
    out = []
    for dtype, dims, layout in re.findall(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\](\{[^}]*\})?", result):
        sizes = [int(n) for n in dims.split(",") if n]
        if "S(" not in layout and sizes:
            share = turns if turns > 1 and sizes[0] == turns else 1
            out.append(math.prod(sizes) * _bits(dtype) / 8 / share)
    return out
