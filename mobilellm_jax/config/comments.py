"""Reads the comments of the config's fields from the source, so that a command can show them."""

import ast
import inspect
import typing
from collections.abc import Iterator

from mobilellm_jax.config import Config


def comments() -> dict[str, str]:
    """Returns {dotted field: comment}. A comment ends the field's line or is above the field."""
    found = {}
    for group, cls in typing.get_type_hints(Config).items():
        source = inspect.getsource(cls)
        lines = source.splitlines()
        (node,) = ast.parse(source).body
        for field in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                end = (field.end_lineno or field.lineno) - 1
                beside = lines[end][field.end_col_offset :]
                above = list(_comments_above(lines, field.lineno - 1))
                text = beside or " ".join(reversed(above))
                found[f"{group}.{field.target.id}"] = text.strip().lstrip("# ")
    return found


def _comments_above(lines: list[str], index: int) -> Iterator[str]:
    """Yields the lines of the comment directly above line `index`, from the last to the first."""
    while lines[index - 1].strip().startswith("#"):
        index -= 1
        yield lines[index].strip().lstrip("# ")
