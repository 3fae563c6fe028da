"""Reads `pytorch_model.bin` without torch, and without running what may be hidden in it.

Both formats of torch.save: a zip archive (torch 1.6 and later), and before that a row of pickles followed by the raw
storages, as the files that the original's authors published in 2020. Pickles are programs, so none is given to
`pickle`: `_interpret` walks through the instructions and knows the two dozen that state dicts consist of.
"""

import dataclasses
import io
import mmap
import os
import pickletools
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from electra_jax.config import UserError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001   # first and second pickle of the older format

_DTYPES = {"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16,
           "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
           "ComplexFloat": np.complex64, "ComplexDouble": np.complex128}
_STORAGES = {f"{module} {name}Storage": np.dtype(dtype) for name, dtype in _DTYPES.items()
             for module in ("torch", "torch.cuda")}
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_GLOBALS = {_TENSOR, _PARAMETER, "collections OrderedDict", "torch Size", "torch device", *_STORAGES}


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    length: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict by name: read-only arrays in the file's dtypes, of any strides.

    A state dict within {"state_dict": ...}, {"model": ...} or {"module": ...} is found too; what is no tensor is left
    out. Raises UserError for a file that is missing, damaged, no state dict, or that asks Python to run anything.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\3\4"
            file.seek(0)
            tree, storages = _read_zip(file) if zipped else _read_legacy(file)
        tensors = _tensors(tree)
        arrays = {name: _array(tensor, storages) for name, tensor in tensors.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a pytorch_model.bin.") from None
    except _Refused as refused:
        raise UserError(f"{path} asks Python to run {str(refused)!a}, which no state dict needs: pickles with code are "
                        "refused. Save the model's state_dict() alone, or safetensors.") from None
    # Damage can trip the readers over anything, so that all of it means the same: a memory or index error too.
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} is damaged or not a state dict of torch ({reason}): download or save it again.") \
            from error
    if not arrays:
        raise UserError(f"{path} has no tensors at its top level, nor in state_dict, model or module: save the "
                        "model's state_dict().")
    return arrays


class _Refused(Exception):
    """The pickle names a function or class that is not among `_GLOBALS`."""


def _read_zip(file) -> tuple[Any, dict[str, Any]]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise ValueError("compressed archive")   # torch never compresses; a small file could fill the memory
        folder = next(name for name in members if name.endswith("/data.pkl")).removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in members and archive.read(order) != b"little":
            raise ValueError("written on a big-endian machine")
        seen: dict[str, _Storage] = {}
        tree = _interpret(io.BytesIO(archive.read(f"{folder}data.pkl")), seen)
        return tree, {key: archive.read(f"{folder}data/{key}") for key in seen}   # zipfile checks the CRCs


def _read_legacy(file) -> tuple[Any, dict[str, Any]]:
    # Mapped, so that a wrong length cannot ask for more memory than the file has bytes.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        if _interpret(view, {}) != _MAGIC or _interpret(view, {}) != _PROTOCOL:
            raise ValueError("unknown file format")
        if _interpret(view, {})["little_endian"] is not True:
            raise ValueError("written on a big-endian machine")
        seen: dict[str, _Storage] = {}
        tree = _interpret(view, seen)
        storages = {}
        for key in _interpret(view, {}):
            length = int.from_bytes(view.read(8), "little")
            storages[key] = view.read(length * seen[key].dtype.itemsize)
        return tree, storages


def _interpret(file, seen: dict[str, _Storage]) -> Any:
    """Returns what the pickle at the file's position describes, and adds its storages to `seen`.

    Builds only dicts, lists, tuples, numbers, strings and the inert records above. Raises _Refused for another
    global, and ValueError for another instruction.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def set_items(items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            _expect(key, str)   # also: hashing nested tuples can take for ever
            _expect(stack[-1], dict)[key] = value

    for opcode, arg, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case ("BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE"):
                stack.append(arg)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "APPEND":
                value = stack.pop()
                _expect(stack[-1], list).append(value)
            case "APPENDS":
                items = above_mark()
                _expect(stack[-1], list).extend(items)
            case "SETITEM":
                items = stack[-2:]
                del stack[-2:]
                set_items(items)
            case "SETITEMS":
                set_items(above_mark())
            case "BUILD":   # the versions of modules, which torch keeps beside the state dict
                stack.pop()
                _expect(stack[-1], dict)
            case "GLOBAL" | "STACK_GLOBAL":
                if opcode.name == "STACK_GLOBAL":
                    name, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
                    arg = f"{module} {name}"
                if arg not in _GLOBALS:
                    raise _Refused(arg[:100].replace(" ", "."))
                stack.append(_Global(arg))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), seen))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_record(_expect(stack.pop(), _Global).name, _expect(arguments, tuple)))
            case _:
                raise ValueError(f"pickle instruction {opcode.name}")
    raise ValueError("the pickle has no end")


def _storage(persistent_id: Any, seen: dict[str, _Storage]) -> _Storage:
    kind, storage_type, key, _, length, *view = _expect(persistent_id, tuple)
    if kind != "storage" or any(part is not None for part in view):
        raise ValueError("a storage that is a part of another")   # torch before 0.4
    storage = _Storage(_STORAGES[_expect(storage_type, _Global).name], _expect(key, str), _expect(length, int))
    if seen.setdefault(storage.key, storage) != storage:
        raise ValueError(f"storage {storage.key!a} has two types")
    return storage


def _record(name: str, arguments: tuple) -> Any:
    """What a call stands for; calls of anything else end here."""
    if name == _TENSOR:
        storage, offset, shape, strides, *_ = arguments
        for number in (offset, *_expect(shape, tuple), *_expect(strides, tuple)):
            _expect(number, int)
        return _Tensor(_expect(storage, _Storage), offset, shape, strides)
    if name == _PARAMETER:
        return _expect(arguments[0], _Tensor)
    if name == "collections OrderedDict" and not arguments:
        return {}
    if name in ("torch Size", "torch device"):
        return arguments
    raise ValueError(f"a call of {name}")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{kind.__name__.strip('_')} expected instead of {type(value).__name__.strip('_')}")
    return value


def _tensors(tree: Any) -> dict[str, _Tensor]:
    """The tensors at the top, or one level below under a name that trainers use."""
    tree = _expect(tree, dict)
    for part in (tree, *(tree.get(name) for name in ("state_dict", "model", "module"))):
        found = {name: x for name, x in part.items() if isinstance(x, _Tensor)} if isinstance(part, dict) else {}
        if found:
            return found
    return {}


def _array(tensor: _Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
    storage, size = tensor.storage, tensor.storage.dtype.itemsize
    data = storages[storage.key]
    if len(data) != storage.length * size or len(tensor.shape) != len(tensor.strides):
        raise ValueError(f"storage {storage.key!a} has {len(data)} bytes for {storage.length} elements")
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, storage.dtype)
    # The constructor checks that shape and strides stay within the buffer.
    return np.ndarray(tensor.shape, storage.dtype, data, tensor.offset * size, [s * size for s in tensor.strides])
