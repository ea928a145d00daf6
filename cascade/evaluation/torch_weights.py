"""PyTorch's weight files, read without unpickling: nothing in them is imported or called.

`torch.save` writes a pickle, a program for a machine with a stack, and numbers beside it. That of a
state dict wants few instructions and few names, and those are what is understood here; at any other
the file is refused. Since PyTorch 1.6 the file is a zip with `data.pkl` and, of each storage, its
numbers in `data/<key>`; before, pickles followed one another, and then the storages. Both formats
are those of torch/serialization.py; Python's pickletools describes the instructions.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cascade.errors import UserError

ZIP, OLD = b"PK\x03\x04", b"\x80\x02\x8a\x0a"  # how files begin
ENCRYPTED = 1  # of a zip entry's flags
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the older format
DTYPES = {
    "torch DoubleStorage": "<f8",
    "torch FloatStorage": "<f4",
    "torch HalfStorage": "<f2",
    "torch IntStorage": "<i4",
    "torch LongStorage": "<i8",
}
DICT, TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
MARK = object()


class Refused(ValueError):
    """What a file holds that no state dict needs, or how it is damaged."""


class Name(NamedTuple):
    """A global, "module name"; never looked up."""

    text: str


class Storage(NamedTuple):
    """Numbers that tensors share: their dtype, key, and how many."""

    dtype: np.dtype
    key: str
    count: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_torch_file(start: bytes) -> bool:
    """Whether a file that begins so was written by `torch.save`."""
    return start.startswith((ZIP, OLD))


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors by name, views of what was read.

    Raises:
      OSError: it can't be read.
      UserError: it is damaged, or holds anything but a state dict of tensors on the CPU.
    """
    content = path.read_bytes()
    try:
        found, storages = _zipped(content) if content.startswith(ZIP) else _old(content)
        if not isinstance(found, dict) or not found:
            raise Refused("it holds no state dict")
        return {str(name): _array(tensor, storages) for name, tensor in found.items()}
    except (ValueError, LookupError, TypeError, EOFError, OverflowError, NotImplementedError) as e:
        said = str(e) if isinstance(e, Refused) else "it is damaged or cut short"
        raise UserError(
            f"{str(path)!r} can't be read as PyTorch weights ({said}); give the file as it was "
            "published, or a safetensors file."
        ) from e


def _zipped(content: bytes) -> tuple[Any, dict[str, bytes]]:
    """What `data.pkl` makes, and the storages by their keys."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise Refused("its zip is compressed, which PyTorch's aren't")
        if any(entry.flag_bits & ENCRYPTED for entry in entries.values()):
            raise Refused("its zip is encrypted, which PyTorch's aren't")
        root = next((name[:-8] for name in entries if name.endswith("data.pkl")), None)
        if root is None:
            raise Refused("its zip has no data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise Refused("its numbers are big-endian")
        found = interpret(io.BytesIO(archive.read(f"{root}data.pkl")))
        inner = f"{root}data/"
        kept = [name for name in entries if name.startswith(inner)]
        return found, {name.removeprefix(inner): archive.read(name) for name in kept}
    except zipfile.BadZipFile as error:
        raise Refused("its zip is damaged or cut short") from error


def _old(content: bytes) -> tuple[Any, dict[str, bytes]]:
    """What the main pickle makes, and the storages, of the format before PyTorch 1.6."""
    stream = io.BytesIO(content)
    if interpret(stream) != MAGIC or interpret(stream) != VERSION:
        raise Refused("it is a pickle, but not torch.save's")
    system = interpret(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("its numbers are big-endian")
    sizes: dict[str, int] = {}
    found = interpret(stream, sizes)
    storages = {}
    for key in interpret(stream):
        count = int.from_bytes(stream.read(8), "little")
        storages[key] = stream.read(count * sizes[key])
    return found, storages


def _array(tensor: Any, storages: Mapping[str, bytes]) -> np.ndarray:
    """A tensor's numbers, checked to lie within its storage."""
    if not isinstance(tensor, Tensor):
        raise Refused("its dict holds something that isn't a tensor")
    (dtype, key, count), offset, shape, strides = tensor
    data = storages.get(key, b"")
    if len(data) != count * dtype.itemsize:
        raise Refused("a storage isn't as long as its tensors say")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > count or (0 not in shape and last >= count):
        raise Refused("a tensor reaches beyond its storage")
    if 0 in shape:
        return np.zeros(shape, dtype)
    steps = tuple(step * dtype.itemsize for step in strides)
    return np.ndarray(shape, dtype, data, offset * dtype.itemsize, steps)


def interpret(stream: io.BytesIO, sizes: dict[str, int] | None = None) -> Any:
    """Walks one pickle to its end.

    Args:
      stream: left behind the pickle.
      sizes: takes bytes a number of each storage, by key.

    Returns:
      Plain values, and in the places of tensors `Tensor`.

    Raises:
      Refused: an instruction, a name or arguments that no state dict needs.
      ValueError, LookupError, TypeError: it is no pickle.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    sizes = {} if sizes is None else sizes
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "GLOBAL":
            if argument not in (DICT, TENSOR, *DTYPES):
                raise Refused(f"it names {argument.replace(' ', '.')[:80]!r}, which isn't run")
            stack.append(Name(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _TUPLES:
            stack.append(tuple(_taken(stack, _TUPLES[name])))
        elif name == "APPEND":
            item = stack.pop()
            _holder(stack, list).append(item)
        elif name in ("APPENDS", "SETITEM", "SETITEMS"):
            items = _taken(stack, 2 if name == "SETITEM" else None)
            if name == "APPENDS":
                _holder(stack, list).extend(items)
            else:
                _set(_holder(stack, dict), items)
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), sizes))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_made(stack.pop(), arguments))
        elif name == "BUILD":  # a state dict's _metadata, which says nothing of tensors
            stack.pop()
            _holder(stack, dict)
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise Refused(f"its pickle has the instruction {name}")
    raise Refused("its pickle has no end")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
_TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _taken(stack: list, count: int | None) -> list:
    """The last `count` values, or those after the last mark, off the stack."""
    if count is None:
        at = len(stack) - 1
        while stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise Refused("its pickle wants a mark that isn't there")
        values = stack[at + 1 :]
        del stack[at:]
        return values
    if len(stack) < count:
        raise Refused("its pickle wants values that aren't there")
    values = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return values


def _holder(stack: list, kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise Refused("its pickle fills something that can't be filled")
    return stack[-1]


def _set(held: dict, items: list):
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):
            raise Refused("its dict has a key that is no text")
        held[key] = value


def _storage(told: Any, sizes: dict[str, int]) -> Storage:
    """A storage from its persistent id, ("storage", type, key, device, count, ...)."""
    if not isinstance(told, tuple) or len(told) not in (5, 6) or told[0] != "storage":
        raise Refused("it refers to something that is no storage")
    kind, key, count = told[1], told[2], told[4]
    if not isinstance(kind, Name) or kind.text not in DTYPES or told[5:] not in ((), (None,)):
        raise Refused("it has a storage of another kind")
    if not isinstance(key, str) or not isinstance(count, int) or count < 0:
        raise Refused("it has a storage without key or size")
    dtype = np.dtype(DTYPES[kind.text])
    sizes[key] = dtype.itemsize
    return Storage(dtype, key, count)


def _made(name: Any, arguments: Any) -> Any:
    """An empty dict, or a tensor."""
    if name == Name(DICT) and arguments == ():
        return {}
    if name != Name(TENSOR) or not isinstance(arguments, tuple) or len(arguments) not in (6, 7):
        raise Refused("it calls what isn't called so")
    storage, offset, shape, strides = arguments[:4]
    if not (isinstance(storage, Storage) and isinstance(shape, tuple | list)):
        raise Refused("it has a tensor without storage or shape")
    numbers = (offset, *shape, *strides)
    if (
        len(shape) != len(strides)
        or len(shape) > 8
        or not all(isinstance(n, int) and n >= 0 for n in numbers)
    ):
        raise Refused("it has a tensor whose shape, strides or offset are no sizes")
    return Tensor(storage, offset, tuple(shape), tuple(strides))
