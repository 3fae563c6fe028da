"""TensorFlow's checkpoints for tests: those in data/tf1, which TensorFlow wrote, and a small writer for odd ones.

The values of each tensor follow from its name, so that tests compute what TensorFlow was given.
"""

import math
import struct
import tarfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

FOLDER = Path(__file__).parent / "data" / "tf1"
PERIOD = 61    # a prime: no table is its own transpose; short: the files compress to a few kB

# Shapes of the fixture `types`, beside 900 scalars with names of 300 letters.
TYPES = {
    "half": ("float16", (3, 5)), "brain": ("bfloat16", (7,)), "single/scalar": ("float32", ()),
    "single/empty": ("float32", (0, 4)), "single/cube": ("float32", (2, 3, 4)), "double": ("float64", (5, 2)),
    "int": ("int32", (9,)), "long/scalar": ("int64", ()), "flag": ("bool", ()), "octets": ("uint8", (1, 300)),
}
LONG_NAMES = [f"{i:03d}/{'long' * 75}" for i in range(900)]


def values(name, shape=(), dtype="float32"):
    """What the tensor `name` holds: multiples of 1/128, exact in every type; LayerNorms' scales lie around 1."""
    seed = zlib.crc32(name.encode())
    numbers = (np.arange(math.prod(shape)) * (seed % (PERIOD - 2) + 1) + seed // PERIOD) % PERIOD - PERIOD // 2
    if dtype in ("float16", "bfloat16", "float32", "float64"):
        numbers = numbers / 128 + ("gamma" in name and "adam" not in name)
    elif dtype in ("uint8", "bool"):
        numbers = np.abs(numbers)
    return numbers.reshape(shape).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def unpack(name, folder):
    """Unpacks the fixture `name` into `folder` and returns the path of its folder there."""
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return Path(folder) / name


# --- A writer of bundles ------------------------------------------------------------------------


def crc32c(data):
    """The masked CRC32C, bit by bit."""
    crc = 0xFFFFFFFF
    for octet in data:
        crc ^= octet
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def message(**fields):
    """A protocol buffer from f1=3, f2=b"..."; fixed32 as f6=(crc,)."""
    out = b""
    for name, value in fields.items():
        number = int(name[1:]) << 3
        if isinstance(value, bytes):
            out += varint(number | 2) + varint(len(value)) + value
        elif isinstance(value, tuple):
            out += varint(number | 5) + struct.pack("<I", *value)
        else:
            out += varint(number) + varint(value)
    return out


def block(items, compression=0):
    """A table's block without shared prefixes, with its trailer."""
    body = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in items) + struct.pack("<II", 0, 1)
    body += bytes([compression])
    return body + struct.pack("<I", crc32c(body))


def table(items, compression=0):
    """A whole index of one block."""
    data = block(items, compression)
    handle = varint(0) + varint(len(data) - 5)
    top = block([(b"\xff", handle)])
    footer = varint(0) + varint(0) + varint(len(data)) + varint(len(top) - 5)
    return data + top + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def entry(shape, offset, data, dtype=1, **fields):
    """A description of a tensor."""
    dims = b"".join(message(f2=message(f1=size)) for size in shape)
    return message(f1=dtype, f2=dims, f4=offset, f5=len(data), f6=(crc32c(data),), **fields)


def write(prefix, tensors, header=None, compression=0):
    """Writes float32 and int64 tensors, or entries ready made (bytes), as a bundle of one shard."""
    items, data = [(b"", message(f1=1) if header is None else header)], b""
    for name in sorted(tensors):
        value = tensors[name]
        if not isinstance(value, bytes):
            octets = value.tobytes()
            value = entry(value.shape, len(data), octets, {"float32": 1, "int64": 9}[str(value.dtype)])
            data += octets
        items.append((name.encode(), value))
    Path(f"{prefix}.index").write_bytes(table(items, compression))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
