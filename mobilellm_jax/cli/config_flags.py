"""Turns `--config=configs/x.py` and `--config.a.b=value` into a checked `Config`.

`split_overrides` removes the overrides before absl parses the other flags. Each value is converted
to the type of its config field, whatever the value looks like. `ml_collections.config_flags` offers
such flags too. We do not use it, because it stops at the first mistake, does not know the allowed
values of a field, and reads `sys.argv`, so one process could not run two commands.
"""

import importlib.util
import math
import re
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.config import Config, ConfigError, field_types, from_object, near_miss
from mobilellm_jax.errors import MissingFileError

_OVERRIDE = re.compile(r"--?config\.(?P<field>[^=]*)(=(?P<value>.*))?", re.DOTALL)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
# The user writes config files, so these errors in their code are mistakes of the user.
_FILE_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    SyntaxError,
    TypeError,
    ValueError,
)


def split_overrides(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into overrides, written as "a.b=value", and all other arguments.

    Raises:
      UsageError: if an override has no value.
    """
    overrides: list[str] = []
    others: list[str] = []
    waiting = list(args)
    while waiting and waiting[0] != "--":
        arg = waiting.pop(0)
        match = _OVERRIDE.fullmatch(arg)
        if match is None:
            others.append(arg)
            continue
        field, value = match["field"], match["value"]
        if value is None:
            if not waiting or waiting[0].startswith("--"):
                raise UsageError(f"--config.{field} has no value; write --config.{field}=VALUE.")
            value = waiting.pop(0)
        overrides.append(f"{field}={value}")
    return overrides, others + waiting


def load_config(file: str, overrides: Sequence[str] = ()) -> Config:
    """Loads a `configs/*.py`, applies `overrides` ("a.b=value"), and returns the checked config.

    Raises:
      MissingFileError: if there is no such file.
      ConfigError: if the file raises an error, an override is wrong, or a value breaks a rule. The
        message lists all wrong overrides or all broken rules.
    """
    groups = _get_config(Path(file)).to_dict()
    problems = []
    for override in overrides:
        field, _, text = override.partition("=")
        try:
            value = parse_value(field, text)
        except ConfigError as error:
            problems.append(str(error))
            continue
        group, _, name = field.partition(".")
        fields = groups.setdefault(group, {})
        if isinstance(fields, dict):  # `from_object` refuses other types.
            fields[name] = value
    if problems:
        raise ConfigError("\n".join(problems))
    return from_object(groups)


def _get_config(path: Path) -> ConfigDict:
    if not path.is_file():
        raise MissingFileError(f"--config={path} is not a file.{_near_file(path)}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path} must be a Python file: configs/NAME.py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config_dict = module.get_config() if hasattr(module, "get_config") else None
    except _FILE_ERRORS as error:
        raise ConfigError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    if not isinstance(config_dict, ConfigDict):
        raise ConfigError(f"--config={path} must define a get_config() that returns a ConfigDict.")
    return config_dict


def _near_file(path: Path) -> str:
    files = {file.stem: file for file in sorted(Path("configs").rglob("*.py"))}
    hint = near_miss(path.stem, files)
    for stem, file in files.items():
        hint = hint.replace(f" {stem}?", f" --config={file}?")
    return hint


def _place(path: Path, error: BaseException) -> str:
    """Returns `path:line` for the line of the config file that raised the error."""
    if isinstance(error, SyntaxError):
        return f"{path}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def parse_value(field: str, text: str) -> Any:
    """Converts `text` to the type of a config field, and returns the value.

    Raises:
      ConfigError: if there is no such field, or `text` is not of its type.
    """
    types = field_types()
    if field not in types:
        inside = [name for name in types if name.startswith(f"{field}.")]
        if inside:
            raise ConfigError(f"{field} is a group of fields; set one, such as {inside[0]}.")
        raise ConfigError(f"{field}: unknown config key.{near_miss(field, types)}")
    expected = types[field]
    if expected is str:
        return text
    if not text:
        raise ConfigError(f"{field}= has no value; it must be {_describe(expected)}.")
    value = _read(expected, text)
    if value is None:
        hint = near_miss(text, typing.get_args(expected)) or _whole_number(expected, text)
        raise ConfigError(f"{field}={text} must be {_describe(expected)}.{hint}")
    return value


def _read(expected: Any, text: str) -> Any:
    """Converts `text` to the expected type; returns None if this is impossible."""
    if typing.get_origin(expected) is Literal:
        return text if text in typing.get_args(expected) else None
    if expected is bool:
        return _BOOLEANS.get(text.lower())
    if expected is int and not re.fullmatch(r"[+-]?\d+(_\d+)*", text):
        return None
    try:
        value = expected(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _describe(expected: Any) -> str:
    if typing.get_origin(expected) is Literal:
        return f"one of {', '.join(typing.get_args(expected))}"
    return {int: "a whole number", float: "a finite number", bool: "true or false"}[expected]


def _whole_number(expected: Any, text: str) -> str:
    """Returns a hint if an int field gets a float: for 1e3, the hint says to write 1000."""
    number = _read(float, text) if expected is int else None
    return f" Write {int(number)}." if number is not None and number == int(number) else ""
