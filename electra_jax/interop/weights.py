"""Weight files of a Hugging Face folder: safetensors, whole or in shards, and torch's `.bin`."""

import json
import zlib
from pathlib import Path

import numpy as np

from electra_jax.config import UserError
from electra_jax.interop import torch_bin
from electra_jax.interop.workdir import check_finite, read_json

_CRCS = "electra_jax_crc32"    # our entry in the safetensors header: the format itself notices no flipped bit


def read(folder: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a folder. Raises UserError for a missing or damaged file and for values not finite."""
    for name, read_file in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", torch_bin.read)):
        files = [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            files = [folder / part for part in sorted(set(_weight_map(index).values()))]
        elif not files[0].exists():
            continue
        tensors: dict[str, np.ndarray] = {}
        for file in files:
            tensors |= read_file(file)
        check_finite(tensors, str(folder))
        return tensors
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin: give the folder of one network.")


def _weight_map(index: Path) -> dict[str, str]:
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(p, str) and "/" not in p for p in parts.values()):
        raise UserError(f"{index} has no weight_map of file names: fetch or write it anew.")
    return parts


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}    # noqa: SIM118 (no mapping)
            crcs = json.loads((opened.metadata() or {}).get(_CRCS, "{}"))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}): it is truncated or damaged, fetch "
                        "or write it anew.") from error
    for name, crc in crcs.items():
        if name not in tensors or _crc(tensors[name]) != crc:
            raise UserError(f"{file}: the CRC of {name} differs from that at its export: fetch or write it anew.")
    return tensors


def write(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes safetensors that transformers loads, with a CRC-32 a tensor in the header."""
    from safetensors.numpy import save_file
    crcs = json.dumps({name: _crc(array) for name, array in tensors.items()})
    save_file(tensors, file, metadata={"format": "pt", _CRCS: crcs})


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
