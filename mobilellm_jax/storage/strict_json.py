"""Reads JSON from untrusted files with strict limits, and converts values to Python types.

`parse` and `read` accept any bytes. They return plain values or raise a `JsonError`. They refuse
JSON that Python's reader accepts and that causes errors later: a key twice in one object, numbers
that are not finite or have hundreds of digits, and deep nesting. `as_type` converts the values to
an annotated type, such as a dataclass. It refuses a whole number beyond 64 bits, and a text with
half a surrogate pair.

The package msgspec also checks types, and its errors contain the path of the wrong field. But
msgspec accepts a key that occurs twice, and it limits the depth only by the recursion limit of
Python. Tests of this file check both properties of msgspec.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.storage import file_kind

MAX_BYTES = 1 << 27
"""Largest size of a file: 4 times the largest tokenizer.json, or a manifest of 100,000 shards."""
MAX_DEPTH = 64
"""Largest nesting depth. Python's reader and recursive functions fail at a few hundred levels."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_INTEGERS = range(-(1 << 63), 1 << 64)
_MAX_DIGITS = 300
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 80
_shortened.maxlevel = 3
_LONGEST_SHOWN = 200
_REQUIRED: Any = object()
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class JsonError(UserError):
    """A JSON text or a value in it is wrong; callers put the file name before the message."""


def read(file: Path) -> Any:
    """Returns the value in a JSON file; a `MissingFileError` or a `JsonError` names the file."""
    if not file.is_file():
        raise MissingFileError(f"{file} {file_kind.absence(file)}.")
    try:
        return parse(content_of(file))
    except JsonError as error:
        raise JsonError(f"{file}: {error}") from error


def read_lines(
    file: Path, check: Callable[[Any], object], *, non_finite: bool = False, whole: bool = False
) -> list[Any]:
    """Returns the values of a file of JSON lines, or an empty list if the file does not exist.

    `check` raises a `JsonError` for a wrong value. Empty lines are ignored. A crash may cut off the
    last line, so the function also ignores a last line that has no line end and is not JSON, unless
    the file must be `whole`. A `JsonError` names the file and the line.
    """
    values = []
    # `str.splitlines` would also split at U+2028 inside a JSON string.
    content = file.read_bytes() if file.is_file() else b""
    file_kind.refuse_stand_in(file, content[: file_kind.FIRST_BYTES])
    lines = content.split(b"\n") if content else []
    for number, line in enumerate(lines, start=1):
        may_be_cut_off = number == len(lines) and not whole
        try:
            if line.strip():
                value = parse(line, non_finite=non_finite)
                may_be_cut_off = False
                check(value)
                values.append(value)
        except JsonError as error:
            if not may_be_cut_off:
                raise JsonError(
                    f"{file}, line {number}: {error} Correct the line or delete it."
                ) from error
    return values


def content_of(file: Path) -> bytes:
    """Returns the bytes of a file; raises a `JsonError` if it is a pointer or too large."""
    with file.open("rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    if kind := file_kind.stand_in(content[: file_kind.FIRST_BYTES]):
        raise JsonError(f"is {kind.name}; {kind.remedy}.")
    if len(content) > MAX_BYTES:
        raise JsonError(f"has more than {MAX_BYTES:,} bytes, which no such file needs.")
    return content


def parse(content: bytes | str, *, non_finite: bool = False) -> Any:
    """Returns the value of a JSON text, or of its UTF-8 bytes; otherwise raises a `JsonError`.

    With `non_finite`, NaN and Infinity are valid: Python writes them, but JSON forbids them.
    """
    try:
        # Editors on Windows put a byte order mark before the text.
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        kind = file_kind.explanation(error.object[: file_kind.FIRST_BYTES])
        raise JsonError(f"is not UTF-8 ({error.reason} at byte {error.start}){kind}.") from error
    constant = float if non_finite else _constant
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=constant,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise JsonError(f"is not JSON ({error.msg} in {place}).") from error
    except RecursionError:
        raise JsonError(_TOO_DEEP) from None
    _check_depth(value)
    return value


def as_type(value: Any, expected: Any, name: str = "") -> Any:
    """Converts a parsed value to the type `expected`; `name` is its path, for messages.

    An object becomes a dataclass with the same fields. An array becomes a list or a tuple. A whole
    number becomes a float if `expected` is float. `Any` accepts every value. A `JsonError` names
    the field, its value and the rule.
    """
    if dataclasses.is_dataclass(expected):
        return _dataclass(value, expected, name)
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin is Literal:
        if not isinstance(value, str) or value not in inner:
            raise _wrong(name, value, f"one of {', '.join(inner)}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in inner:
            return None
        [expected] = [each for each in inner if each is not types.NoneType]
        return as_type(value, expected, name)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _wrong(name, value, "an object")
        return {key: as_type(each, inner[1], _inside(name, key)) for key, each in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise _wrong(name, value, "an array")
        fixed = origin is tuple and inner[-1] is not Ellipsis
        if fixed and len(value) != len(inner):
            raise _wrong(name, value, f"an array of {len(inner)}")
        hints = inner if fixed else [inner[0]] * len(value)
        items = enumerate(zip(value, hints, strict=True))
        return origin(as_type(each, hint, f"{name}[{i}]") for i, (each, hint) in items)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise _wrong(name, value, _NAMES[expected])
    if expected is int and value not in _INTEGERS:
        raise _wrong(name, value, "a whole number of at most 64 bits")
    if expected is str and not value.isascii() and _SURROGATE.search(value):
        raise _wrong(name, value, "a text without half a surrogate pair")
    return value


def get(holder: Any, key: str, expected: Any, default: Any = _REQUIRED, name: str = "") -> Any:
    """Returns field `key` of a parsed object, converted by `as_type`; ignores other fields.

    If the field is missing or null, the function returns `default`. Without a default, a missing
    field is an error. `name` is the path of the object, for messages.
    """
    if not isinstance(holder, dict):
        raise _wrong(name, holder, "an object")
    value = holder.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if key not in holder:
        raise JsonError(f"{_inside(name, key)} is missing.")
    return as_type(value, expected, _inside(name, key))


def plain(name: str) -> str:
    """Returns a short printable name unchanged, and the shortened repr of any other name."""
    return name if name.isprintable() and 0 < len(name) <= _shortened.maxstring else shown(name)


def shown(value: Any) -> str:
    """Returns the repr of a value for a message, shortened if it is long."""
    text = _shortened.repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


_TOO_DEEP = f"is nested more than {MAX_DEPTH} deep."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        [(twice, _)] = collections.Counter(key for key, _ in pairs).most_common(1)
        raise JsonError(f"has the key {shown(twice)} twice in one object.")
    return result


def _integer(text: str) -> int:
    # Other programs write large numbers: transformers writes 10^30 for "no limit". But `int` takes
    # quadratic time, and it refuses a text with thousands of digits.
    if len(text) > _MAX_DIGITS:
        raise JsonError(f"holds the whole number {text[:24]}..., which has {len(text):,} digits.")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise JsonError(f"holds the number {text[:24]}, which is beyond the range of floats.")
    return number


def _constant(text: str) -> float:
    raise JsonError(f"holds {text}, which is not a number in JSON.")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        lists = [list(each.values()) for each in level if isinstance(each, dict)]
        lists += [each for each in level if isinstance(each, list)]
        if not lists:
            return
        level = list(itertools.chain.from_iterable(lists))
    raise JsonError(_TOO_DEEP)


_hints = functools.cache(typing.get_type_hints)


def _dataclass(value: Any, cls: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    hints = _hints(cls)
    for key in value:
        if key not in hints:
            raise JsonError(f"{_inside(name, key)} is an unknown field.")
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in value:
            raise JsonError(f"{_inside(name, field.name)} is missing.")
    return cls(**{k: as_type(v, hints[k], _inside(name, k)) for k, v in value.items()})


def _inside(name: str, key: str) -> str:
    return f"{name}.{plain(key)}" if name else plain(key)


def _wrong(name: str, value: Any, rule: str) -> JsonError:
    return JsonError(f"{name}={shown(value)} must be {rule}." if name else f"must be {rule}.")


def with_null(value: Any) -> Any:
    """Returns a value for JSON with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: with_null(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_null(each) for each in value]
    return value
