"""Reads collectives, memory traffic and kernels, loops in full, from the text of a compiled program (optimised HLO)."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

_BITS = {"pred": 8, "bf16": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}; of an axis perhaps a part, 'b':(1)2, behind 1 and 2 long
_MESH = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((?:\[([\d,]+)\]T\(([\d,]+)\)|([\d,]+))\))? \{(.*?)\}")


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
    times = _runs(bodies)
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
                sizes = {dtype: 0 for dtype, _, _ in _ARRAY.findall(result)}
                for dtype, dims, _ in _ARRAY.findall(result):
                    sizes[dtype] += math.prod(map(int, filter(None, dims.split(",")))) * _bits(dtype) // 8
                payload = sum(sizes.values())
                if start and kind in ("all-gather", "reduce-scatter"):    # a tuple of operands and results
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
                                        (bool(start or again) and '"is_sync":true' not in line) or name in hidden,
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


def _runs(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in a step."""
    runs: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        runs[name] = runs.get(name, 0) + count
        for line in bodies.get(name, ()):
            turns = _trip_count(line, bodies) if " while(" in line else 1
            for callee in _called(line):
                visit(callee, count * turns)

    visit("", 1)
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
    if match := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        ids = np.arange(math.prod(sizes.values()))
        if match[2]:
            ids = ids.reshape(_ints(match[2])).transpose(_ints(match[3]))
        ids = np.array(_ints(match[4])) if match[4] else ids
        places = {name: [0] for name in sizes}
        for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[5]):
            stride = sizes[name] // (int(before) * int(part)) if part else 1
            places[name] = [stride * i for i in range(int(part or sizes[name]))]
        return tuple(int(i) for i in ids.reshape(list(sizes.values()))[np.ix_(*places.values())].reshape(-1))
    if match := _GROUPS.search(line):       # [groups, size] <= [iota] T(permutation)
        ids = np.arange(math.prod(dims := _ints(match[3]))).reshape(dims)
        ids = ids.transpose(_ints(match[4])) if match[4] else ids
        return tuple(int(i) for i in ids.reshape(int(match[1]), int(match[2]))[0])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(_ints(match[1]))
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", line):    # a device may send to itself: nothing moves
        pairs = [tuple(_ints(pair)) for pair in re.findall(r"\{([\d,]+)", match[1])]
        return next((pair for pair in pairs if pair[0] != pair[1]), ())
    return tuple(range(num_devices))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


# What starts no work and moves no data itself, or was counted where it started.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id", "iota"}
# Custom calls that do: libraries (__cublas$lt$matmul, __cudnn$fmhaSoftmax) and kernels. Others only mark something.
_LIBRARY = re.compile(r'custom_call_target="(__|cu|tpu_custom_call)')
# Collectives whose result names their operands as well.
_TUPLES = {"all-gather-start", "reduce-scatter-start", "all-to-all-start", "collective-permute-start"}
_COPIES = {"copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start", "async-start"}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:,|$)")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str            # its type
    opcode: str
    operands: list[str]    # their names
    line: str

    def count(self) -> int:
        """Elements of the result's first array."""
        return math.prod(_ints(match[2])) if (match := _ARRAY.search(self.result)) and match[2] else 1

    def sizes(self, hbm: bool = True) -> list[float]:
        """Bytes of each array of the result; 0 for scalars and, with `hbm`, for what lies outside of main memory."""
        sizes = []
        # Libraries return the memory that they work in beside their results.
        scratch = self.opcode == "custom-call" or "kind=kCustom" in self.line
        for dtype, dims, layout in _ARRAY.findall(self.result):
            skip = not dims or (hbm and "S(" in layout) or (scratch and dtype in ("s8", "u8") and "," not in dims)
            sizes.append(0.0 if skip else math.prod(_ints(dims)) * _bits(dtype) / 8)
        return sizes


def traffic(hlo: str) -> float:
    """Bytes that the program reads from and writes to main memory in a step, loops counted in full.

    Every instruction outside of fusions reads its operands and writes its result, unless they lie in a TPU's vector
    memory (S(1) in their layout). Of an operand that is only sliced or looked up in, what comes out counts; of one
    that is updated in place, the update. Of a conditional all branches count. The compiler's own figure ("bytes
    accessed") counts the body of a loop once.
    """
    bodies = _computations(hlo)
    total = 0.0
    for count, body in _outside_fusions(bodies):
        hbm, sizes = {i.name: sum(i.sizes()) for i in body}, {i.name: sum(i.sizes(hbm=False)) for i in body}
        for i in filter(_works, body):
            # Of a kernel that gets one array several times, as flash attention its queries, keys and values.
            once = dict.fromkeys(i.operands) if i.opcode == "custom-call" else i.operands
            operands = [hbm.get(operand, 0.0) for operand in once]
            if i.opcode in _COPIES:
                # What arrives in vector memory was read once; a copy within main memory writes as well.
                moved = min(filter(None, i.sizes(hbm=False)), default=0.0)
                total += count * moved * (1 if "S(" in i.result or i.opcode == "async-start" else 2)
            elif i.opcode in _TUPLES:
                total += count * hbm[i.name]
            else:
                read, written = _parts(i, sizes, bodies)
                total += count * sum(min(size, read.get(k, size)) for k, size in enumerate(operands))
                total += count * sum(min(size, written.get(k, size)) for k, size in enumerate(i.sizes()))
    return total


def kernels(hlo: str) -> int:
    """Kernels and library calls that a GPU's program launches in a step; a collective counts as one."""
    bodies = _computations(hlo)
    return sum(count * sum(map(_works, body)) for count, body in _outside_fusions(bodies, conditions=False))


def _works(i: _Instruction) -> bool:
    return not (i.opcode in _FREE or i.opcode.endswith("-done")
                or (i.opcode == "custom-call" and not _LIBRARY.search(i.line)))


def _parse(lines: list[str]) -> list[_Instruction]:
    matches = ((_INSTRUCTION.match(line), line) for line in lines)
    return [_Instruction(m[1], m[2], m[3], re.findall(r"%([\w.\-]+)", m[4]), line) for m, line in matches if m]


def _outside_fusions(bodies: dict[str, list[str]], conditions: bool = True) -> Iterator[tuple[int, list[_Instruction]]]:
    """Yields the computations that run by themselves with how often they do.

    `conditions=False` leaves out those of loops whose length is known, which a GPU's runtime does not run.
    """
    inner = set()
    for line in itertools.chain.from_iterable(bodies.values()):
        if " while(" in line:
            if not conditions and "known_trip_count" in line:
                inner.add(re.search(r"condition=%([\w.\-]+)", line)[1])
        elif " call(" not in line and " conditional(" not in line:
            inner.update(_called(line))
    for name, count in _runs(bodies).items():
        if name not in inner:
            yield count, _parse(bodies.get(name, []))


def _parts(i: _Instruction, sizes: dict[str, float], bodies: dict[str, list[str]]
           ) -> tuple[dict[int, float], dict[int, float]]:
    """Bytes that `i` reads of operands and writes of results, by place, where that may be less than the whole."""
    if i.opcode in ("slice", "dynamic-slice", "gather"):
        return {0: sizes[i.name]}, {}
    if i.opcode == "dynamic-update-slice":    # not read, only overwritten
        return {0: 0.0}, {0: sizes.get(i.operands[1], 0.0)}
    if i.opcode == "scatter":    # adds to what is there: n arrays, the places, n updates
        n = len(i.operands) // 2
        updates = {k: sizes.get(i.operands[n + 1 + k], 0.0) for k in range(n)}
        return updates, updates
    if i.opcode == "fusion":
        return _fused_parts(_parse(bodies.get(_called(i.line)[0], [])), bodies)
    return {}, {}


def _fused_parts(body: list[_Instruction], bodies: dict[str, list[str]]) -> tuple[dict[int, float], dict[int, float]]:
    """`_parts` of a fusion: what is needed of each parameter, and what is written of results updated in place."""
    named = {i.name: i for i in body}
    sizes = {i.name: sum(i.sizes(hbm=False)) for i in body}

    def passes(i: _Instruction) -> bool:    # TPUs: also a fusion in a fusion that copies an array onto itself
        return i.opcode == "bitcast" or (i.opcode == "fusion" and "output_to_operand_aliasing={{}: (0, {})}" in i.line)

    def source(name: str) -> str:
        while name in named and passes(named[name]):
            name = named[name].operands[0]
        return name

    parameters = {i.name: int(re.search(r"parameter\((\d+)\)", i.line)[1]) for i in body if i.opcode == "parameter"}
    root = next((i for i in body if i.line.lstrip().startswith("ROOT ")), None)
    outputs = [source(name) for name in (root.operands if root.opcode == "tuple" else [root.name])] if root else []
    written = {}
    counts = {i.name: i.count() for i in body}
    needed: dict[str, float] = {}    # bytes of each result that the instructions behind it look at
    for i in reversed(body):
        size = sizes[i.name]
        share = 1.0 if i is root else min(1.0, needed.get(i.name, 0.0) / size) if size else 0.0
        parts, update = _parts(i, sizes, bodies)
        in_place = update and i.name in outputs and source(i.operands[0]) in parameters
        if in_place and i.opcode != "fusion":
            written[outputs.index(i.name)] = update[0]
        for k, operand in enumerate(i.operands):
            if update and k == 0 and not in_place:    # a copy, updated
                part = sizes.get(operand, 0.0)
            elif k in parts:
                part = parts[k] * (1.0 if update else share)
            elif i.opcode == "pad":
                part = min(sizes.get(operand, 0.0), share * size)
            else:    # numbers made of one number each; of anything else, all is needed
                part = sizes.get(operand, 0.0) * (share if i.count() == counts.get(operand) else 1.0)
            needed[operand] = needed.get(operand, 0.0) + part
    return {k: needed.get(name, 0.0) for name, k in parameters.items()}, written
