"""Makes a config from a file's `ConfigDict`, whose fields may be computed from other fields.

A config file can say `config.optimizer.warmup_steps = config.train.get_ref("steps") // 10`.
`ml_collections` computes such a field when it is read. A `Recipe` therefore applies all changes to
the `ConfigDict` first and reads the fields afterwards.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, RequiredValueError

from mobilellm_jax.config import Config, ConfigError, from_object

_CANNOT_COMPUTE = (ArithmeticError, LookupError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The fields of a config file, and changes of these fields."""

    fields: Mapping[str, Any]  # {group: {field: value or reference}}; never changed.
    file: str  # Name of the file, for messages.
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {dotted field: value}

    def changed(self, change: Mapping[str, Any]) -> "Recipe":
        """Returns a recipe with further changes, which replace earlier changes of a field."""
        kept = {name: value for name, value in self.changes.items() if name not in change}
        return dataclasses.replace(self, changes={**kept, **change})

    @functools.cached_property
    def config(self) -> Config:
        """The checked config. Computed fields follow the changes, unless a change sets them.

        Raises:
          ConfigError: if a field cannot be computed, or the config breaks rules.
        """
        groups = copy.deepcopy(dict(self.fields))  # References between the copies stay.
        for dotted, value in self.changes.items():
            group, _, name = dotted.partition(".")
            fields = groups.setdefault(group, {})
            if not isinstance(fields, dict):
                continue  # `from_object` refuses a value in place of a group.
            if isinstance(fields.get(name), FieldReference):
                fields[name].set(value, type_safe=False)
            else:
                fields[name] = value
        # Fields that are not computed are read first. If such a field has no value, the error names
        # this field and not a field that is computed from it.
        for dotted, reference in _references(groups).items():
            if not reference._ops:
                self._read(reference, dotted)
        return from_object({group: self._read(node, group) for group, node in groups.items()})

    def computed(self) -> frozenset[str]:
        """Returns the dotted fields that the file computes from other fields."""
        return frozenset(name for name, value in _references(self.fields).items() if value._ops)

    def _read(self, node: Any, field: str) -> Any:
        """Returns the value of a field, or of all fields in a group."""
        if isinstance(node, dict):
            return {name: self._read(value, f"{field}.{name}") for name, value in node.items()}
        if not isinstance(node, FieldReference):
            return node
        try:
            return node.get()
        except RequiredValueError:
            raise ConfigError(
                f"{field} has no value in {self.file}, which requires one; write "
                f"--config.{field}=VALUE."
            ) from None
        except _CANNOT_COMPUTE as error:
            raise ConfigError(
                f"{self.file} computes {field} from other fields, and this fails: "
                f"{type(error).__name__}: {error}; write --config.{field}=VALUE."
            ) from error


def recipe_of(values: ConfigDict, file: str) -> Recipe:
    """Returns the recipe of a `ConfigDict`, with its references."""
    return Recipe(_unlocked(values), file)


def fixed(config: Config, file: str = "config.json") -> Recipe:
    """Returns the recipe of a config in which no field is computed from another field."""
    return Recipe(dataclasses.asdict(config), file)


def _references(groups: Mapping[str, Any]) -> dict[str, FieldReference]:
    return {
        f"{group}.{name}": value
        for group, fields in groups.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if isinstance(value, FieldReference)
    }


def _unlocked(node: Any) -> Any:
    # A copy or a lock of a `ConfigDict` would compute its references, which is too early here.
    if not isinstance(node, ConfigDict):
        return node
    items = node.items(preserve_field_references=True)
    return {name: _unlocked(value) for name, value in items}
