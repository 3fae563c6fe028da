"""Accelerators, the links between them, and what a step's work takes on them at best (formulas: scaling.py)."""

import dataclasses
import math
import re
import types
from collections.abc import Sequence

from electra_jax import metrics
from electra_jax.config import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the roofline needs to know beside the peak; bandwidths in bytes a second, in one direction."""

    kind: str            # what JAX calls it: the key of the peaks in metrics.py
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float    # a TPU's link to one neighbour; all NVLinks of a GPU
    dimensions: int = 0      # of the torus; 0: a GPU
    nic_bandwidth: float = 0.0   # a GPU's share of the network between nodes of eight


# TPU: cloud.google.com/tpu/docs/{v5e,v5p,v6e}: "HBM capacity and bandwidth", and "bidirectional inter-chip
# interconnect bandwidth per chip" (v5e 400, v5p 1,200, v6e 800 GB/s) over two directions and 4
# (v5e, v6e) or 6 ports. HBM: what the compiler grants a program (its message when one does not fit).
# GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200 (HGX), half of NVLink's two-way bandwidth;
# a NIC of 200 (DGX A100) or 400 Gbit/s (DGX H100, H200, B200) a GPU.
CHIPS = {
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 819e9, 50e9, 2),
    "v5p": Chip("TPU v5", 95.74 * GIB, 2765e9, 100e9, 3),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 1640e9, 100e9, 2),
    "a100": Chip("NVIDIA A100-SXM4-80GB", 80e9, 2039e9, 300e9, nic_bandwidth=25e9),
    "h100": Chip("NVIDIA H100 80GB HBM3", 80e9, 3350e9, 450e9, nic_bandwidth=50e9),
    "h200": Chip("NVIDIA H200", 141e9, 4800e9, 450e9, nic_bandwidth=50e9),
    "b200": Chip("NVIDIA B200", 180e9, 8000e9, 900e9, nic_bandwidth=50e9),
}

# Slices of 2D and 3D tori that can be rented, by number of chips.
SLICES = {2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
           3: {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4),
               128: (4, 4, 8), 256: (4, 8, 8)}}


def parse_topology(text: str) -> tuple[str, tuple[int, ...]]:
    """Returns ("v5e", (4, 4)) for "v5e:4x4" and ("h100", (8,)) for "h100:8"; raises UserError."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology={text}: {name!r} is not one of {', '.join(CHIPS)}.")
    if not re.fullmatch(r"\d+(x\d+)*", shape) or len(shape.split("x")) != (CHIPS[name].dimensions or 1):
        example = {2: "4x4", 3: "2x2x4", 0: "8"}[CHIPS[name].dimensions]
        raise UserError(f"--topology={text}: give the shape behind a colon, such as {name}:{example}.")
    return name, tuple(int(n) for n in shape.split("x"))


def links(chip: Chip, shape: tuple[int, ...], extents: Sequence[int]) -> int:
    """Links of a chip that a group spanning `extents` chips an axis can use; the slice is `shape` chips.

    An axis is a ring, with two links, where it is whole and wraps around: 16 chips on v5e and v6e (their pod), and
    on v5p in slices made of cubes of 4 x 4 x 4 (cloud.google.com/tpu/docs).
    """
    cubes = chip.dimensions == 3 and all(size % 4 == 0 for size in shape)
    count = 0
    for size, extent in zip(shape, extents, strict=True):
        if extent > 1:
            count += 2 if extent == size and (cubes or (chip.dimensions == 2 and size == 16)) else 1
    return count


def levels(chip: Chip, shape: tuple[int, ...], extents: Sequence[int]) -> list[tuple[int, float]]:
    """The stages of a collective as (chips, bytes a second in one direction): one on a torus, two across nodes.

    `extents` of GPUs: how many, in nodes of eight filled one by one, or (in a node, nodes).
    """
    size = math.prod(extents)
    if chip.dimensions:
        return [(size, links(chip, shape, extents) * chip.link_bandwidth)]
    node = min(extents[0], 8)
    return [(node, chip.link_bandwidth), (size // node, chip.nic_bandwidth)]


def collective_s(kind: str, payload: float, stages: Sequence[tuple[int, float]]) -> float:
    """Seconds of a collective over `payload` bytes of the whole array; latency is not counted."""
    seconds = 0.0
    for size, bandwidth in stages:
        if size > 1:
            share = 1.0 if kind == "collective-permute" else (size - 1) / size * (2 if kind == "all-reduce" else 1)
            seconds += share * payload / bandwidth
            payload /= size
    return seconds


def peak(chip: Chip) -> float:
    """The chip's peak in bfloat16 FLOP/s, from metrics.py."""
    platform = "tpu" if chip.dimensions else "gpu"
    return metrics.peak_flops(types.SimpleNamespace(platform=platform, device_kind=chip.kind))


def roofline(chip: Chip, flops: float, hbm_bytes: float, hidden_s: float, exposed_s: float,
             attainable: float) -> dict[str, float]:
    """The times of one chip's work, in seconds: its step takes the longest of what runs together, and the rest."""
    compute_s, hbm_s = flops / (peak(chip) * attainable), hbm_bytes / chip.hbm_bandwidth
    return {"compute_s": compute_s, "hbm_s": hbm_s, "hidden_s": hidden_s, "exposed_s": exposed_s,
            "step_s": max(compute_s, hbm_s, hidden_s) + exposed_s}


def extents(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """How far a group of `size` neighbours reaches along each axis of a slice."""
    out = []
    for length in reversed(shape):
        out.append(math.gcd(size, length))
        size //= out[-1]
    return tuple(reversed(out))


def reach(chip: Chip, devices: Sequence) -> tuple[int, ...]:
    """How far a group of JAX's devices reaches: along each axis of a torus, or (GPUs in a node, nodes)."""
    if chip.dimensions:
        return tuple(len({device.coords[axis] for device in devices}) for axis in range(chip.dimensions))
    nodes = len({device.id // 8 for device in devices})
    return len(devices) // nodes, nodes
