"""What every measurement needs: clocks, medians with their spread, versions, the machine, memory."""

import importlib.metadata
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import electra_jax

# A vocabulary as large as BERT's, for configs that take their size from a tokenizer.
VOCAB_SIZE = 30_522
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES")
_GROUP_S = 0.02   # short calls are timed by groups of about that: dispatching one takes 0.05 ms


def about(what: str, *libraries: str) -> dict[str, Any]:
    """Returns the fields that every result begins with: what, versions (those of `libraries` too), machine,
    cores, flags (the environment's that change a program's speed).
    """
    versions = {"electra_jax": electra_jax.__version__, "python": platform.python_version()}
    for name in libraries:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"what": what, "versions": versions, "machine": _machine(), "cores": cores,
            "flags": {name: os.environ[name] for name in _FLAGS if name in os.environ}}


def of_devices(devices: Iterable) -> dict[str, Any]:
    """Returns the fields about JAX's devices."""
    devices = list(devices)
    fields = {"device": devices[0].device_kind, "devices": len(devices)}
    if devices[0].platform != "cpu":   # CUDA's or libtpu's version
        fields["backend"] = " ".join(str(getattr(devices[0].client, "platform_version", "")).split())
    return fields


def _machine() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def spread(name: str, seconds: list[float], unit: float = 1.0, digits: int = 3) -> dict[str, float]:
    """Returns {name: median, name_min, name_max} of times, multiplied by `unit`."""
    values = {name: statistics.median(seconds), f"{name}_min": min(seconds), f"{name}_max": max(seconds)}
    return {key: round(value * unit, digits) for key, value in values.items()}


def timed(call: Callable[[], Any], steps: int, warmup: int) -> list[float]:
    """Times `call`, whose result JAX is waited for, `steps` times: the seconds of each.

    What takes less than _GROUP_S is called several times in a row and waited for once.
    """
    import jax
    for _ in range(max(1, warmup)):
        start = time.perf_counter()
        jax.block_until_ready(call())
        once_s = time.perf_counter() - start
    group, seconds = min(100, max(1, math.ceil(_GROUP_S / once_s))), []
    for _ in range(steps):
        start = time.perf_counter()
        for _ in range(group):
            result = call()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / group)
    return seconds


def peak_gib(device=None) -> float:
    """Returns the most memory that was in use at once in GiB: the device's, on a CPU this process's."""
    stats = (device.memory_stats() if device is not None else None) or {}
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round(stats.get("peak_bytes_in_use", own) / 2**30, 3)


def out_of_memory(error: Exception) -> bool:
    """Tells an exception for want of memory, the device's or the host's, from others."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory"))


def special_ids() -> dict[str, int]:
    """Ids of [PAD], [CLS], [SEP] and [MASK] in the rows that are drawn here."""
    return {"pad": 0, "cls": 1, "sep": 2, "mask": 3}


def random_rows(rng, batch_size: int, seq_len: int, vocab_size: int) -> dict:
    """Draws rows of one piece of full length, int32 [B, L]: what a step costs does not depend on the text."""
    import numpy as np
    ids = rng.integers(4, vocab_size, (batch_size, seq_len), dtype=np.int32)
    ids[:, 0], ids[:, -1] = 1, 2
    return {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "piece_ids": np.ones_like(ids),
            "position_ids": np.tile(np.arange(seq_len, dtype=np.int32), (batch_size, 1))}
