"""Reads TensorFlow's checkpoints (tensor bundles) without TensorFlow.

A bundle is PREFIX.index, a LevelDB table from names to descriptions of tensors (protocol buffers), beside
PREFIX.data-00000-of-0000N, which hold the bytes of the tensors. Blocks of the index and tensors carry a CRC32C each;
every one that is read is checked.
"""

import ast
import dataclasses
import functools
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from electra_jax.config import UserError

_MAGIC = 0xDB4775248B80FB57    # ends every LevelDB table
_FOOTER_BYTES, _TRAILER_BYTES = 48, 5
_STRING = 7

# TensorFlow's numbers of the types (types.proto).
_DTYPES = {1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 9: "int64", 10: "bool",
           14: ml_dtypes.bfloat16, 17: "uint16", 19: "float16", 22: "uint32", 23: "uint64"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `size` bytes from `offset` of `file`; `dtype` is TensorFlow's number of the type."""

    dtype: int
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int
    crc32c: int      # masked
    sliced: bool     # a partitioned variable, whose parts are stored under names of their own


def find_prefix(path: str | os.PathLike) -> str:
    """Returns the PREFIX that `path` means: PREFIX itself, one of its files, or a folder.

    In a folder the file `checkpoint` decides, else the only bundle, else the one with the largest number at its end.
    Raises UserError where there is no bundle or no telling which.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _prefix_in_folder(path)
    prefix = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", str(path))
    if not Path(f"{prefix}.index").is_file():
        raise UserError(f"{prefix}.index does not exist: give a local folder, or PREFIX of its files PREFIX.index and "
                        "PREFIX.data-00000-of-00001.")
    return prefix


def _prefix_in_folder(folder: Path) -> str:
    if (folder / "checkpoint").is_file():
        text = (folder / "checkpoint").read_text(errors="replace")
        if named := re.search(r'^model_checkpoint_path:\s*("(?:[^"\\\n]|\\.)*")', text, re.MULTILINE):
            # The path on the machine that wrote it: relative to the folder, or absolute and perhaps moved since.
            named = Path(_unescape(named.group(1)))
            for prefix in (folder / named, folder / named.name):
                if Path(f"{prefix}.index").is_file():
                    return str(prefix)
            raise UserError(f"{folder}/checkpoint names {named.name}, which is not there: copy its files, or give "
                            "PREFIX of another PREFIX.index.")
    found = sorted(f.with_suffix("") for f in folder.glob("*.index"))
    if not found:
        raise UserError(f"{folder} has no file *.index: give a folder with a TensorFlow checkpoint, or its PREFIX.")
    numbered = [re.fullmatch(r"(.*-)(\d+)", prefix.name) for prefix in found]
    if len(found) > 1 and (None in numbered or len({match[1] for match in numbered}) > 1):
        raise UserError(f"{folder} has several checkpoints, such as {found[0].name} and {found[-1].name}: give the "
                        f"PREFIX of one, e.g. {found[0]}.")
    newest = max(range(len(found)), key=lambda i: int(numbered[i][2]) if numbered[i] else 0)
    return str(found[newest])


def _unescape(quoted: str) -> str:
    try:
        return ast.literal_eval("b" + quoted).decode()    # text protocol buffers escape bytes as C and Python do
    except (SyntaxError, ValueError):
        return quoted[1:-1]


def read_bundle(prefix: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors of `names`; of all but strings (such as the object graph) without `names`.

    Raises UserError for a missing name or file, for damage, and for what is not supported: strings, complex and
    quantised types, partitioned variables.
    """
    entries = read_index(prefix)
    if names is None:
        names = [name for name, entry in entries.items() if entry.dtype != _STRING]
    out = {}
    for name in names:
        if name not in entries:
            raise UserError(f"{prefix} has no variable {name}: it is not the checkpoint that was expected.")
        out[name] = _read(name, entries[name])
    return out


def _read(name: str, entry: Entry) -> np.ndarray:
    if entry.sliced:
        raise UserError(f"{entry.file}: {name} is partitioned, which is not supported: save it in one piece.")
    if entry.dtype not in _DTYPES:
        kind = "text" if entry.dtype == _STRING else f"TensorFlow's type number {entry.dtype}"
        raise UserError(f"{entry.file}: {name} is {kind}, which is not supported: leave it out.")
    dtype = np.dtype(_DTYPES[entry.dtype])
    try:
        # Before the allocation, which a wrong size must not decide.
        if entry.file.stat().st_size < entry.offset + entry.size:
            raise UserError(f"{entry.file} ends before {name}: copy the checkpoint again.")
        octets = np.fromfile(entry.file, np.uint8, entry.size, offset=entry.offset)
    except OSError as error:
        raise UserError(f"{entry.file} cannot be read ({error.strerror}), {name} lies there: copy the whole "
                        "checkpoint.") from error
    if _mask(crc32c(octets)) != entry.crc32c:
        raise UserError(f"{entry.file}: the checksum of {name} differs: copy the checkpoint again.")
    try:
        return octets.view(dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(entry.shape)
    except ValueError as error:
        raise UserError(f"{entry.file}: {name} has {entry.size} bytes, not those of {dtype} {entry.shape}: copy the "
                        "checkpoint again.") from error


# --- The index ----------------------------------------------------------------------------------


def read_index(prefix: str | os.PathLike) -> dict[str, Entry]:
    """Returns the tensors' entries by name, in the order of names.

    Raises UserError for a missing or damaged index, and for one of a big-endian machine.
    """
    path = Path(f"{prefix}.index")
    try:
        items = _table(path.read_bytes())
        key, header = next(items)
        num_shards, big_endian = _header(header)
        if key:
            raise ValueError("it has no header")
        if big_endian:
            raise UserError(f"{path} was written on a big-endian machine, which is not supported: save it again on "
                            "a little-endian one.")
        # A key that starts with 0 names a part of a partitioned variable.
        return {key.decode(): _entry(value, str(prefix), num_shards) for key, value in items if key[0]}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the PREFIX of a checkpoint.") from error
    except (ValueError, IndexError, StopIteration, struct.error) as error:
        raise UserError(f"{path} is damaged, or not of a TensorFlow checkpoint ({error}): copy it again.") from error


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table."""
    if len(data) < _FOOTER_BYTES or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise ValueError("its last bytes are not those of an index")
    footer = data[-_FOOTER_BYTES:]
    _, at = _handle(footer, 0)    # of the filters, which TensorFlow does not use
    (offset, size), _ = _handle(footer, at)
    for _, handle in _block(data, offset, size):
        yield from _block(data, *_handle(handle, 0)[0])


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block; a key leaves out what it shares with the one before."""
    end = offset + size
    compression, crc = struct.unpack("<BI", data[end : end + _TRAILER_BYTES])
    if _mask(crc32c(np.frombuffer(data, np.uint8, size + 1, offset))) != crc:    # the type of compression included
        raise ValueError("a checksum differs")
    if compression:
        raise UserError("the checkpoint's index is compressed (Snappy), which is not supported: load and save it with "
                        "TensorFlow's Saver, which does not compress.")
    block = data[offset:end]
    (num_restarts,) = struct.unpack("<I", block[-4:])
    stop = size - 4 - 4 * num_restarts    # the restart points, for searching, are not needed
    at, key = 0, b""
    while at < stop:
        shared, at = _varint(block, at)
        length, at = _varint(block, at)
        value_length, at = _varint(block, at)
        if shared > len(key) or at + length + value_length > stop:
            raise ValueError("an entry is out of bounds")
        key = key[:shared] + block[at : at + length]
        at += length + value_length
        yield key, block[at - value_length : at]


# --- Protocol buffers ---------------------------------------------------------------------------


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns the number that starts at `at`, 7 bits a byte, and where the next field starts."""
    value = 0
    for shift in range(0, 70, 7):
        octet = data[at]
        value |= (octet & 127) << shift
        at += 1
        if octet < 128:
            return value, at
    raise ValueError("a number is too long")


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Tags (8 * the field's number + the kind of its value) and values: an int, or bytes of a submessage."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
            value, at = int.from_bytes(message[at : at + length], "little"), at + length
        else:
            raise ValueError(f"a field of kind {kind}")
        if at > len(message):
            raise ValueError("a field is out of bounds")
        yield tag, value


def _header(message: bytes) -> tuple[int, bool]:
    """BundleHeaderProto: num_shards = 1, endianness = 2."""
    fields = dict(_fields(message))
    return fields.get(8 * 1, 0), bool(fields.get(8 * 2, 0))


def _entry(message: bytes, prefix: str, num_shards: int) -> Entry:
    """BundleEntryProto: dtype = 1, shape = 2, shard_id = 3, offset = 4, size = 5, crc32c = 6, slices = 7."""
    fields = dict(_fields(message))
    shape = fields.get(8 * 2 + 2, b"")    # TensorShapeProto: dim = 2, of which size = 1
    dims = tuple(dict(_fields(dim)).get(8 * 1, 0) for tag, dim in _fields(shape) if tag == 8 * 2 + 2)
    file = Path(f"{prefix}.data-{fields.get(8 * 3, 0):05d}-of-{num_shards:05d}")
    return Entry(fields.get(8 * 1, 0), dims, file, fields.get(8 * 4, 0), fields.get(8 * 5, 0),
                 fields.get(8 * 6 + 5, 0), sliced=8 * 7 + 2 in fields)


# --- CRC32C -------------------------------------------------------------------------------------


def crc32c(octets: np.ndarray) -> int:
    """Returns the CRC32C (Castagnoli) of a uint8 array; 400 MB/s in NumPy.

    The array is cut into lanes that advance side by side, four bytes a step. The CRC is linear over GF(2): two
    neighbouring lanes join by advancing the left one over as many zero bytes as the right one has.
    """
    num_lanes = 1 << max(0, min(12, (len(octets) // 64).bit_length() - 1))
    steps = len(octets) // 4 // num_lanes
    words = octets[: 4 * steps * num_lanes].view("<u4").reshape(num_lanes, steps)
    low, high = _four_bytes()
    lanes = np.zeros(num_lanes, np.uint32)
    lanes[0] = 0xFFFFFFFF
    for step in range(steps):
        lanes ^= words[:, step]
        lanes = low[lanes & 0xFFFF] ^ high[lanes >> 16]
    advance = _zero_bytes(4 * steps)
    while len(lanes) > 1:
        lanes = _apply(advance, lanes[::2]) ^ lanes[1::2]
        advance = _apply(advance, advance)
    crc, table = int(lanes[0]), _one_byte()
    for octet in octets[4 * steps * num_lanes :].tolist():
        crc = int(table[(crc ^ octet) & 255]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _mask(crc: int) -> int:
    """As LevelDB stores a CRC, lest the CRC of data that hold their own CRC be trivial."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _one_byte() -> np.ndarray:
    """The register after one byte, by its lowest byte before."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    return table


@functools.cache
def _four_bytes() -> tuple[np.ndarray, np.ndarray]:
    """The register after four zero bytes, by its lower and by its upper half before."""
    halves = [np.arange(65536, dtype=np.uint32) << shift for shift in (0, 16)]
    for _ in range(4):
        halves = [_one_byte()[half & 255] ^ (half >> 8) for half in halves]
    return halves[0], halves[1]


def _zero_bytes(count: int) -> np.ndarray:
    """The linear map of `count` zero bytes: the images of the 32 single bits."""
    power, out = np.uint32(1) << np.arange(32, dtype=np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32)
    power = _one_byte()[power & 255] ^ (power >> 8)
    while count:
        if count & 1:
            out = _apply(power, out)
        power = _apply(power, power)
        count >>= 1
    return out


def _apply(images: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """Applies the linear map to each register."""
    bits = (registers[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(bits * images, axis=1)
