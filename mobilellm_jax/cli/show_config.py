"""Shows every field of a config with its value, its meaning, and the place that sets it."""

import textwrap
from collections.abc import Iterator

from mobilellm_jax.config import Config, changed_fields, field_types
from mobilellm_jax.config.comments import comments
from mobilellm_jax.config.recipe import Recipe

_WIDTH = 90


def config_lines(recipe: Recipe) -> Iterator[str]:
    """Yields the lines of the config, which are grouped like its fields."""
    meanings, config = comments(), recipe.config
    set_by_user = changed_fields(Config(), config)
    computed = recipe.computed()
    shown_group = ""
    for field in field_types():
        group, _, name = field.partition(".")
        if group != shown_group:
            shown_group = group
            yield f"{group}:"
        if field in recipe.changes:
            origin = "command line"
        elif field in computed:
            origin = f"{recipe.file}, computed"
        else:
            origin = recipe.file if field in set_by_user else "default"
        value = getattr(getattr(config, group), name)
        yield f"  {name} = {value!r}  ({origin})"
        yield textwrap.indent(textwrap.fill(meanings[field], _WIDTH), "      ")
