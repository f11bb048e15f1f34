"""Turns `--config=configs/x.py` and `--config.a.b=value` into a checked `Config`.

`split_overrides` removes the overrides before absl parses the other flags. Each value is converted
to the type of its config field, whatever the value looks like. `ml_collections.config_flags` offers
such flags too. We do not use it, because it stops at the first mistake, does not know the allowed
values of a field, and reads `sys.argv`, so one process could not run two commands.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Sequence
from typing import Any, Literal

from mobilellm_jax.cli.config_files import read_recipe
from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.config import COMPUTATION, Config, ConfigError, field_types, near_miss
from mobilellm_jax.config.recipe import Recipe
from mobilellm_jax.config.synonyms import field_hint
from mobilellm_jax.errors import UserError

CONFIG_HELP = "recipe: a name or file in configs/, a Python file, or the config.json of a run"
_OVERRIDE = re.compile(r"--?config\.(?P<field>[^=]*)(=(?P<value>.*))?", re.DOTALL)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


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
    """Returns the checked config of `load_recipe`; raises the same errors."""
    return load_recipe(file, overrides).config


def load_recipe(file: str, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a config file and applies `overrides` ("a.b=value").

    If several overrides set the same field, the last one applies.

    Raises:
      MissingFileError: if there is no such file.
      ConfigError: if the file raises an error, or an override is wrong. The message lists all wrong
        overrides.
    """
    recipe = read_recipe(file)
    problems = []
    for override in overrides:
        field, _, text = override.partition("=")
        try:
            change = _model_of(text) if field == "model" else {field: parse_value(field, text)}
            recipe = recipe.changed(change)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return recipe


def _model_of(ckpt: str) -> dict[str, Any]:
    """Returns the fields of a checkpoint's model, without the fields that say how to compute it."""
    from mobilellm_jax.open_model import read_model_config  # The import of jax is slow.

    try:
        model = read_model_config(ckpt)
    except UserError as error:
        raise ConfigError(
            f"--config.model={ckpt} takes the model from a checkpoint: {error} To set one field, "
            "write --config.model.FIELD=VALUE."
        ) from error
    fields = dataclasses.asdict(model)
    return {f"model.{name}": fields[name] for name in fields if name not in COMPUTATION}


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
        raise ConfigError(f"{field}: unknown config key.{field_hint(field, types)}")
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
