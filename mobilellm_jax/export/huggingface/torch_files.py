"""Reads the tensors of a `pytorch_model.bin` without torch and without running its pickle.

`torch.save` writes a zip archive. The entry `NAME/data.pkl` is a pickle that describes the tensors,
and the entries `NAME/data/KEY` contain their numbers. A pickle is a program, which can call any
function. This module interprets only the instructions that tensors need. It recognizes functions by
their names and never calls them. It refuses all other instructions and functions.
`StoredTensor.read` reads the numbers of a tensor and compares their checksum.

`torch.load(weights_only=True)` is not used, because it takes 2^n steps for a small pickle of n
nested tuples, and because it does not compare checksums, so it accepts changed numbers. The tests
check both for this module.
"""

import contextlib
import errno
import functools
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.source import DTYPES
from mobilellm_jax.storage import file_kind
from mobilellm_jax.storage.strict_json import plain, shown

# The pickle of a thousand tensors has a quarter of a megabyte.
_MOST_PICKLE_BYTES = 1 << 22
_MOST_AXES = 8
# Tied weights are stored once, and two tensors refer to them. If more tensors could refer to the
# same numbers, a small file could fill the memory.
_MOST_SHARING = 2

_DTYPES = {
    "FloatStorage": DTYPES["float32"],
    "HalfStorage": DTYPES["float16"],
    "BFloat16Storage": DTYPES["bfloat16"],
}


class StoredTensor(NamedTuple):
    """A tensor in a file; only `read` reads its values."""

    shape: tuple[int, ...]
    dtype: str  # A key of DTYPES.
    read: Callable[[], np.ndarray]  # Returns the values in `dtype`.


class _Refused(Exception):  # noqa: N818  # never leaves this file
    """The reason why a file is refused."""


class _Name(NamedTuple):
    module: str
    name: str


class _Storage(NamedTuple):
    kind: str
    key: str
    values: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The index of the last value that the tensor uses in its storage, plus 1."""
        if not self.size:
            return self.offset
        return (
            self.offset
            + 1
            + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        )


def open_torch(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors, by name, of a dict that `torch.save` (1.6 or newer) wrote."""
    with _refusals(file), file.open("rb") as opened:
        if (first := opened.read(file_kind.FIRST_BYTES))[:2] != b"PK":
            raise UserError(
                f"{file} is not a zip archive, which torch writes since version 1.6; if the file "
                f"is older, load it with torch and save it again{file_kind.explanation(first)}."
            )
        with zipfile.ZipFile(opened) as archive:
            return _open(file, archive)


@contextlib.contextmanager
def _refusals(file: Path, name: str = "") -> Iterator[None]:
    try:
        yield
    except (  # zipfile raises NotImplementedError for a compression that it does not know.
        *(zipfile.BadZipFile, struct.error, NotImplementedError, UnicodeDecodeError),
        *(OSError, _Refused),
    ) as error:
        problem = str(error)
        if isinstance(error, OSError):
            # EINVAL means that a damaged index points before the start of the file.
            if error.errno != errno.EINVAL:
                raise
            problem = "its index points outside the file"
        if name:
            problem = f"{plain(name)}: {problem}"
        raise UserError(
            f"{file} is not a whole file of torch tensors: {problem}; save the weights as "
            "safetensors, or as a plain dict of tensors."
        ) from error


def _open(file: Path, archive: zipfile.ZipFile) -> dict[str, StoredTensor]:
    entries = {info.filename: info for info in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise _Refused("an entry occurs twice in it")
    pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise _Refused(f"it has {len(pickles)} entries NAME/data.pkl, not one")
    folder = pickles[0].split("/")[0]
    if f"{folder}/byteorder" in entries:
        order = _content(archive, entries[f"{folder}/byteorder"], 100)
        if order != b"little":
            raise _Refused(f"its byte order is {shown(order)}, not little")
    tree = _interpreted(_content(archive, entries[pickles[0]], _MOST_PICKLE_BYTES))
    if not isinstance(tree, dict):
        raise _Refused(f"it holds {shown(tree)}, not a dict of tensors")
    tensors, whole_bytes = {}, 0
    for name, tensor in tree.items():
        if not isinstance(tensor, _Tensor):
            raise _Refused(f"{plain(name)} is {shown(tensor)}, not a tensor")
        dtype = _DTYPES.get(tensor.storage.kind)
        if dtype is None:
            raise _Refused(
                f"{plain(name)} is of a {plain(tensor.storage.kind)}; only {', '.join(_DTYPES)} "
                "can be read (quantised weights cannot)"
            )
        info = entries.get(f"{folder}/data/{tensor.storage.key}")
        if info is None:
            raise _Refused(f"the numbers of {plain(name)} are missing")
        _check(name, tensor, dtype, info)
        whole_bytes += tensor.size * dtype.itemsize
        read = functools.partial(_read, file, name, info, dtype, tensor)
        tensors[name] = StoredTensor(tensor.shape, str(dtype.name), read)
    if whole_bytes > _MOST_SHARING * file.stat().st_size:
        raise _Refused(f"its tensors have {whole_bytes:,} bytes, more than the file could hold")
    return tensors


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int) -> bytes:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise _Refused(f"{plain(info.filename)} is compressed or encrypted, which torch never does")
    if info.file_size > most_bytes:
        raise _Refused(f"{plain(info.filename)} has {info.file_size:,} bytes, over {most_bytes:,}")
    try:
        content = archive.read(info)
    except (EOFError, RuntimeError) as error:
        raise _Refused(f"{plain(info.filename)} is cut off") from error
    if len(content) != info.file_size:
        raise _Refused(f"{plain(info.filename)} is cut off")
    return content


def _check(name: str, tensor: _Tensor, dtype: np.dtype[Any], info: zipfile.ZipInfo) -> None:
    """Checks that the storage is complete, and that the tensor uses only values inside it."""
    if info.file_size != tensor.storage.values * dtype.itemsize:
        raise _Refused(
            f"the numbers of {plain(name)} are {info.file_size:,} bytes, not "
            f"{tensor.storage.values:,} of {dtype.name}"
        )
    if tensor.end > tensor.storage.values:
        raise _Refused(f"{plain(name)} reaches beyond its numbers")


def _read(
    file: Path, name: str, info: zipfile.ZipInfo, dtype: np.dtype[Any], tensor: _Tensor
) -> np.ndarray:
    with _refusals(file, name), zipfile.ZipFile(file) as archive:
        content = _content(archive, info, info.file_size)
    if not tensor.size:
        return np.empty(tensor.shape, dtype)
    values = np.frombuffer(content, dtype)[tensor.offset :]
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    # `_check` has already checked that the tensor uses only values inside its storage.
    return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)


def _interpreted(content: bytes) -> Any:
    """Returns the value that the pickle describes, with a `_Tensor` in place of each tensor."""
    stack = _Stack()
    try:
        for code, argument, _ in pickletools.genops(content):
            if code.name == "STOP":
                return stack.result()
            stack.execute(code.name, argument)
    except (ValueError, struct.error) as error:
        raise _Refused(f"its pickle is damaged ({error})") from error
    raise _Refused("its pickle does not end")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
# Maps an instruction to the number of values it takes from the stack; None: all above a mark.
_TAKES: dict[str, int | None] = {
    **{"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None},
    **{"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None},
    **{"BINPERSID": 1, "REDUCE": 2, "BUILD": 1, "BINPUT": 1, "LONG_BINPUT": 1},
}


class _Stack:
    """The stack of the pickle interpreter; the instruction MARK starts a new level of values."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._levels: list[list[Any]] = []  # The values below each mark.
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if self._levels or len(self._values) != 1:
            raise _Refused("its pickle ends with more than one value")
        return self._values[0]

    def execute(self, code: str, argument: Any) -> None:
        """Executes one instruction; raises `_Refused` for one that no file of tensors needs."""
        if code in _TAKES:
            self._execute_taken(code, argument, self._taken(_TAKES[code]))
        elif code in _CONSTANTS:
            self._values.append(_CONSTANTS[code])
        elif code in _ARGUMENTS:
            self._values.append(argument)
        elif code in ("EMPTY_DICT", "EMPTY_LIST"):
            self._values.append({} if code == "EMPTY_DICT" else [])
        elif code == "GLOBAL":
            module, _, name = argument.partition(" ")
            self._values.append(_Name(module, name))
        elif code in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise _Refused("its pickle recalls a value that it has not stored")
            self._values.append(self._memo[argument])
        elif code == "MARK":
            self._levels.append(self._values)
            self._values = []
        elif code not in ("PROTO", "FRAME"):
            raise _Refused(f"its pickle has the instruction {code}, which no tensor needs")

    def _execute_taken(self, code: str, argument: Any, taken: list[Any]) -> None:
        top = self._values[-1] if self._values else None
        match code:
            case "BINPUT" | "LONG_BINPUT":
                [self._memo[argument]] = taken
                self._values += taken
            case "APPEND" | "APPENDS":
                if not isinstance(top, list):
                    raise _Refused("its pickle appends to a value that is not a list")
                top.extend(taken)
            case "SETITEM" | "SETITEMS":
                if not isinstance(top, dict) or len(taken) % 2:
                    raise _Refused("its pickle sets items of a value that is not a dict")
                _set_items(top, taken)
            case "BINPERSID":
                self._values.append(_storage(*taken))
            case "REDUCE":
                self._values.append(_called(*taken))
            case "BUILD":
                # torch uses BUILD to attach metadata to a state dict, but never for a tensor. The
                # metadata are ignored.
                if not isinstance(top, dict):
                    raise _Refused("its pickle gives a state to a value without one")
            case _:
                self._values.append(tuple(taken))

    def _taken(self, count: int | None) -> list[Any]:
        if count is None and self._levels:
            taken, self._values = self._values, self._levels.pop()
        elif count is not None and len(self._values) >= count:
            taken = self._values[len(self._values) - count :]
            del self._values[len(self._values) - count :]
        else:
            raise _Refused("its pickle takes more from the stack than there is")
        return taken


def _set_items(target: dict[str, Any], items: Sequence[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise _Refused(f"a dict in it has the key {shown(key)}, not a text")
        if key in target:
            raise _Refused(f"{plain(key)} occurs twice in it")
        target[key] = value


def _storage(identifier: Any) -> _Storage:
    match identifier:
        case ("storage", _Name("torch", kind), str(key), str(), int(values)) if values >= 0:
            return _Storage(kind, key, values)
    raise _Refused(f"its pickle refers to {shown(identifier)}, which is not the data of a tensor")


def _called(function: Any, arguments: Any) -> Any:
    """Returns what a call in the pickle would return; only three functions are allowed."""
    match function, arguments:
        case _Name("collections", "OrderedDict"), ():
            return {}
        case _Name("torch._utils", "_rebuild_parameter"), (_Tensor() as tensor, *_):
            return tensor
        case (
            _Name("torch._utils", "_rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_),
        ):
            numbers = (offset, *shape, *strides)
            sound = all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
            if sound and len(shape) == len(strides) <= _MOST_AXES:
                return _Tensor(storage, offset, shape, strides)
    named = ".".join(function) if isinstance(function, _Name) else function
    raise _Refused(
        f"its pickle calls {shown(named)} with {shown(arguments)}, which no tensor needs"
    )
