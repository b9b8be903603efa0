"""Reads the pickles that ``torch.save`` writes, without Python's or torch's unpickler.

Those build whatever a pickle asks for, if only tensors: gigabytes from a stride of 0, say. Here a pickle is a list of
instructions for plain containers, numbers, strings, and tensors that are only *described*: where in the file their
numbers are is found, and compared with the file, by the module ``torch_files``. Nothing is imported and nothing called
that is not written in this module.
"""

import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, BinaryIO

import torch

from library.support.stored_tensors import Place, is_count, is_shape

# The largest real ones have some 200,000; each makes an object of at most some hundred bytes.
_MOST_INSTRUCTIONS = 1_000_000
_PLAIN_KEYS = (str, bytes, int, float, type(None))
# Real ones number parameters. Python's dicts become slow where large ones are chosen for it.
_LARGEST_KEY = 2**32


class DamagedError(Exception):
    """The file is not what it should be; the message says in what, as the end of a sentence."""


class RefusedError(Exception):
    """The file holds what is not read here; the message names it, in the plural."""


@dataclass(eq=False)
class Storage:
    """A run of ``count`` numbers in the file; ``start`` is its first byte, once that is known."""

    key: str
    dtype: torch.dtype
    count: int
    start: int = -1

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.dtype.itemsize


@dataclass(eq=False)
class StoredTensor:
    """A tensor that is still in the file: a part of a storage, from element ``offset`` on."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        return Place(self.dtype, self.shape, self.stride, self.storage.start + self.offset * self.dtype.itemsize)


@dataclass(frozen=True)
class _StorageKind:
    dtype: torch.dtype


class _Parameters(dict[Any, Any]):
    """What stands for a ParameterDict, in which old embedding files keep their vectors."""


class _Unneeded:
    """What stands for a value of numpy's that trainers keep beside the weights; it is read past, never made."""

    def __init__(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class _Call:
    """What stands for a class or function of a pickle: the function of this module that does its work."""

    run: Callable[..., Any]


def read_pickle(file: BinaryIO, storages: dict[str, Storage]) -> Any:
    """The content of the pickle that begins here; the storages that it names are added to ``storages``.

    Raises DamagedError or RefusedError.
    """
    machine = _Machine(storages)
    try:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(file)):
            if number > _MOST_INSTRUCTIONS:
                raise DamagedError("it holds far more objects than a model has")
            if instruction.name == "STOP":
                break
            if (step := _STEPS.get(instruction.name)) is None:
                raise RefusedError("Python objects besides tensors")
            step(machine, argument)
        return machine.stack.pop()
    except (DamagedError, RefusedError):
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedError("its list of tensors cannot be read") from error


class _Machine:
    """The stack, the marks on it and the memo, on which a pickle's instructions work."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def push(self, value: Any) -> None:
        if isinstance(value, str):
            value.encode("utf-8")  # a ValueError for halves of characters, which could not be printed
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict, Counter) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain_key(key)] = value

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Call) or type(arguments) is not tuple:
            raise RefusedError("Python objects besides tensors")
        self.push(function.run(*arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Parameters):
            parameters = state.get("_parameters") if isinstance(state, dict) else None
            target.update(parameters if isinstance(parameters, dict) else {})
        elif not isinstance(target, OrderedDict | _Unneeded):  # torch keeps versions of modules there
            raise RefusedError("Python objects besides tensors")

    def storage(self) -> None:
        """Replace the description of a storage, a tuple, by the storage."""
        name, kind, key, _, count, *view = self.stack.pop()
        if name != "storage" or not isinstance(kind, _StorageKind) or not is_count(count) or any(view):
            raise DamagedError("it describes its data in an unknown way")
        if not isinstance(key, str | int):  # a tuple of tuples of … may have a name without end
            raise DamagedError("it describes its data in an unknown way")
        found = self.storages.setdefault(str(key), Storage(str(key), kind.dtype, count))
        if (found.dtype, found.count) != (kind.dtype, count):
            raise DamagedError("it contradicts itself about where its data is")
        self.push(found)


def _plain_key(key: Any) -> Any:
    """A key of a dict or set; others may take for ever to compare."""
    if not isinstance(key, _PLAIN_KEYS) or (isinstance(key, int) and abs(key) >= _LARGEST_KEY):
        raise RefusedError("Python objects besides tensors")
    return key


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    return _tensor_of(storage, getattr(storage, "dtype", None), offset, shape, stride)


def _tensor_with_dtype(
    storage: Any, offset: Any, shape: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any
) -> StoredTensor:
    return _tensor_of(storage, dtype, offset, shape, stride)


def _tensor_of(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise DamagedError("it describes a tensor without data")
    if dtype not in _REAL:
        raise RefusedError("complex or quantized tensors")
    if not is_shape(shape):
        raise DamagedError("it holds a tensor without a valid shape")
    strides_fit = isinstance(stride, list | tuple) and len(stride) == len(shape) and all(map(is_count, stride))
    if not strides_fit or not is_count(offset):
        raise DamagedError("it holds a tensor without a valid shape")
    found = StoredTensor(storage, dtype, offset, tuple(shape), tuple(stride))
    if offset * dtype.itemsize + found.place.span > storage.size or prod(shape) * dtype.itemsize > storage.size:
        raise DamagedError(f"it holds a tensor of shape {list(shape)}, but not as many numbers")
    return found


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise DamagedError("it describes a tensor without data")
    return data


def _tensor_with_attributes(function: Any, _: Any, arguments: Any, state: Any) -> StoredTensor:
    if function.run not in (_tensor, _tensor_with_dtype, _parameter):
        raise RefusedError("tensors of a special kind")
    return _with_attributes(function.run(*arguments), state)


def _parameter_with_attributes(data: Any, _: Any, __: Any, state: Any) -> StoredTensor:
    return _with_attributes(_parameter(data), state)


def _with_attributes(tensor: StoredTensor, state: Any) -> StoredTensor:
    if isinstance(state, tuple):  # attributes, and those of slots
        state = state[0]
    plain = {name: value for name, value in (state or {}).items() if isinstance(value, bool | int | float | str)}
    tensor.attributes = {name: value for name, value in plain.items() if not hasattr(torch.Tensor, name)}
    return tensor


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_plain_key(key), value) for key, value in pairs)


def _counter(counts: Any = ()) -> Counter[Any]:
    pairs = counts.items() if isinstance(counts, dict) else counts
    return Counter({_plain_key(key): value for key, value in pairs})


def _encoded(text: Any, encoding: Any = "") -> bytes:
    """Bytes, which the pickles that torch writes hold as text in Latin-1."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedError("Python objects besides tensors")
    return text.encode("latin-1")


def _bytes(content: Any = b"", encoding: Any = "") -> bytearray:
    return bytearray(content if isinstance(content, bytes) else _encoded(content, encoding))


def _set(items: Any = ()) -> set[Any]:
    return {_plain_key(item) for item in items}


def _size(sizes: Any = ()) -> torch.Size:
    if not is_shape(sizes):
        raise TypeError
    return torch.Size(sizes)


def _device(kind: Any, index: Any = None) -> torch.device:
    try:
        return torch.device(kind) if index is None else torch.device(kind, index)
    except RuntimeError as error:
        raise DamagedError("it names an unknown device") from error


def _refuse(what: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise RefusedError(what)

    return refuse


_REAL = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool,
}  # fmt: skip
_TRAINERS = ("pytorch_lightning.", "lightning.")  # such as the first Stable Diffusion's
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered_dict,
    "collections Counter": _counter,
    "_codecs encode": _encoded,
    "__builtin__ bytearray": _bytes,
    "builtins bytearray": _bytes,
    "__builtin__ set": _set,
    "builtins set": _set,
    "__builtin__ complex": complex,
    "builtins complex": complex,
    "numpy dtype": _Unneeded,
    "numpy ndarray": _Unneeded,
    "numpy.core.multiarray scalar": _Unneeded,
    "numpy.core.multiarray _reconstruct": _Unneeded,
    "numpy._core.multiarray scalar": _Unneeded,
    "numpy._core.multiarray _reconstruct": _Unneeded,
    "torch Size": _size,
    "torch device": _device,
    "torch.nn.parameter Parameter": _parameter,
    "torch.nn.modules.container ParameterDict": lambda: _Parameters(),
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter_with_attributes,
    "torch._tensor _rebuild_from_type_v2": _tensor_with_attributes,
    "torch Tensor": _refuse("tensors in an outdated form"),
    "torch._utils _rebuild_sparse_tensor": _refuse("sparse tensors"),
    "torch._utils _rebuild_qtensor": _refuse("quantized tensors"),
    "torch._utils _rebuild_nested_tensor": _refuse("nested tensors"),
    "torch._utils _rebuild_meta_tensor_no_storage": _refuse("meta tensors, which have no data"),
    "torch._utils _rebuild_wrapper_subclass": _refuse("tensors of another library's class"),
}


def _named(name: str) -> Any:
    module, _, attribute = name.partition(" ")
    if module in ("torch", "torch.cuda", "torch.storage") and attribute in _STORAGES:
        return _StorageKind(_STORAGES[attribute])
    if module == "torch" and isinstance(dtype := getattr(torch, attribute, None), torch.dtype):
        return dtype
    if module == "torch" and attribute.startswith("per_"):  # schemes such as per_tensor_affine
        raise RefusedError("quantized tensors")
    if "sparse" in name or "nested" in name:  # their layouts and classes, named before the tensor itself
        return _Call(_refuse("sparse or nested tensors"))
    if name == "torch.serialization _get_layout":
        return _Call(_refuse("sparse tensors"))
    if module.startswith(_TRAINERS):
        return name  # a class, by which trainers sort what they keep; as a text it is a name and cannot be called
    if name not in _CALLS:
        raise RefusedError("Python objects besides tensors")
    return _Call(_CALLS[name])


_Step = Callable[[_Machine, Any], None]
_STEPS: dict[str, _Step] = {
    "PROTO": lambda machine, _: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING"),
        _Machine.push,
    ),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, name: machine.push(_named(name)),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.storage(),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, index: machine.memo.update({index: machine.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
}
