"""Defines the flags of a command by a dataclass that has one field for each flag.

absl defines and parses the flags. It converts each value to the type of the field. Every
flag that names a file or a folder has the type `Path`, so `user_path` reads all of them in the same
way. We do not use absl's `app.run`, because its exit code is 1 if a flag is wrong, and ours is 2.
"""

import dataclasses
import textwrap
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from absl import flags

from mobilellm_jax.cli.config_flags import split_overrides
from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.config import field_types, near_miss
from mobilellm_jax.config.synonyms import flag_hint, translated
from mobilellm_jax.storage.user_path import user_path

Flags = TypeVar("Flags")

_DEFINE: dict[Any, Callable[..., Any]] = {
    str: flags.DEFINE_string,
    Path: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    list[str]: flags.DEFINE_multi_string,
    list[Path]: flags.DEFINE_multi_string,
    list[float]: flags.DEFINE_multi_float,
}


def flag(default: Any, help: str, **settings: Any) -> Any:
    """Returns a dataclass field that describes a flag.

    `settings` are arguments of absl: lower_bound, upper_bound, enum_values. With `required=True`,
    the user must give the flag, unless the user gives the flag that `unless` names. With
    `commas=True`, the user writes a list as one flag with commas; otherwise the user repeats the
    flag.
    """
    return dataclasses.field(metadata={"default": default, "help": help, **settings})


def define(kind: type) -> flags.FlagValues:
    """Returns absl flags for the fields of a dataclass, with their default values."""
    own: flags.FlagValues = flags.FlagValues()  # type: ignore[no-untyped-call]  # absl is untyped
    hints = _types(kind)
    for field in dataclasses.fields(kind):
        hint, settings = hints[field.name], dict(field.metadata)
        for ours in ("required", "unless"):
            settings.pop(ours, None)
        if typing.get_origin(hint) is Literal:
            settings["enum_values"] = typing.get_args(hint)
        make: Callable[..., Any]
        if "enum_values" in settings:
            make = flags.DEFINE_enum
        elif settings.pop("commas", False):
            make = flags.DEFINE_list
        else:
            make = _DEFINE[hint]
        make(field.name, flag_values=own, **settings)
    return own


def _types(kind: type) -> dict[str, Any]:
    """Returns {flag: type}; the type of a flag that is declared as `X | None` is X."""
    hints = typing.get_type_hints(kind)
    for name, hint in hints.items():
        if typing.get_origin(hint) is types.UnionType:
            [hints[name]] = [each for each in typing.get_args(hint) if each is not types.NoneType]
    return hints


def _converted(name: str, hint: Any, value: Any) -> Any:
    """Returns the value of a flag; makes each text of a flag of paths a `Path`."""
    if hint == list[Path] and value is not None:
        return [user_path(f"--{name}", text) for text in value]
    return user_path(f"--{name}", value) if hint is Path and value is not None else value


def parse(name: str, kind: type[Flags], args: list[str]) -> tuple[Flags, list[str]]:
    """Parses a command's arguments; returns its flags, and config overrides as "a.b=value".

    Raises:
      UsageError: if a flag is unknown, missing or wrong, or an argument is not a flag.
    """
    own = define(kind)
    overrides, args = split_overrides(args)
    if overrides and "config" not in own:
        field = overrides[0].partition("=")[0]
        raise UsageError(f"unknown flag --config.{field}; {name} takes no config.")
    try:
        stray = own([name, *args])[1:]
    except flags.UnrecognizedFlagError as error:
        hint = _hint(error.flagname, own)
        raise UsageError(
            f"unknown flag --{error.flagname}.{hint} See mobilellm {name} --help."
        ) from None
    except flags.Error as error:
        raise UsageError(str(error)) from None
    missing = [
        field
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]  # a dataclass of flags
        if field.metadata.get("required") and own[field.name].value is None
        if not (field.metadata.get("unless") and own[field.metadata["unless"]].value)
    ]
    lines = [f"--{field.name} is missing: {field.metadata['help']}" for field in missing]
    if stray:
        pairs = zip(missing, stray, strict=False)
        likely = " ".join(f"--{field.name}={word}" for field, word in pairs)
        likely = likely or "flags as --name=value"
        lines.insert(0, f"stray argument {stray[0]!r}; write {likely}.")
    if lines:
        raise UsageError("\n".join([*lines, f"See mobilellm {name} --help."]))
    hints = _types(kind)
    return kind(**{flag: _converted(flag, hints[flag], own[flag].value) for flag in own}), overrides


def _hint(unknown: str, own: flags.FlagValues) -> str:
    """Returns a sentence with the flag or the config field that the user may have meant."""
    fields = field_types() if "config" in own else {}
    return (
        flag_hint(unknown, list(own))
        or translated(unknown, fields, prefix="--config.") * bool(fields)
        or near_miss(f"--{unknown}", [f"--{flag}" for flag in own])
    )


def usage(kind: type) -> str:
    """Returns the help text of all flags."""
    own = define(kind)
    lines = ["Flags:"]
    for field in dataclasses.fields(kind):
        each = own[field.name]
        switch = f"--[no]{each.name}" if each.boolean else f"--{each.name}"
        lines.append(f"  {switch}")
        lines.append(textwrap.indent(textwrap.fill(_help(field, each), 90), "      "))
        if each.name == "config":
            lines += [
                "  --config.GROUP.FIELD=VALUE",
                "      replaces one field of the config; may be repeated; `mobilellm train",
                "      --config=FILE --show_config` lists the fields",
                "  --config.model=CKPT",
                "      takes the shape of the model from a checkpoint",
            ]
    return "\n".join(lines)


def _help(field: "dataclasses.Field[Any]", each: "flags.Flag[Any]") -> str:
    # The help text comes from the field, because absl appends words of its own to `each.help`.
    text: str = field.metadata["help"]
    if choices := getattr(each.parser, "enum_values", None):
        text = f"{text}: {', '.join(choices)}"
    elif isinstance(each, flags.MultiFlag) and "repeated" not in text:
        text += "; may be repeated"
    return text if each.default in (None, "", []) else f"{text} (default: {each.default_as_str})"
