"""Lists the runs of a sweep: all combinations of rows, values of fields, rates and seeds."""

import dataclasses
import hashlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.config.recipe import Recipe
from mobilellm_jax.model.size import flops_per_token
from mobilellm_jax.paper.grids import SHAPE, GridName, ScaleName, grid_rows, shape_name
from mobilellm_jax.paper.sizes import SOLVED, solve_width

_log = logging.getLogger(__name__)
# Longest name of a model in bytes. The name of a run is the name of its model, the seed and the
# learning rate; a file name has at most 255 bytes.
_LONGEST_NAME = 200

TUNED = "optimizer.peak_lr"
"""The field whose value a run with `tune_from` takes from another run."""

Variants = dict[str, Recipe]
"""Recipes of a sweep by name, before `with_seeds` sets their seeds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a sweep."""

    name: str  # Name of the run and of its folder.
    config: Config
    model: str = ""  # Name of the model, which its runs with other seeds and learning rates share.
    # Names of runs that train the same model at different learning rates. This run uses the rate of
    # the best of these runs, and ignores `optimizer.peak_lr` in `config`.
    tune_from: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """The model FLOPs of the whole training."""
        per_token = flops_per_token(self.config.model, self.config.data.seq_len)
        return float(self.config.tokens) * per_token


def grid_variants(
    recipe: Recipe, grids: Iterable[GridName], scale: ScaleName, group: str = ""
) -> Variants:
    """Returns one recipe per row. A row that is in several grids gives only one recipe.

    The row sets the shape of the model. `recipe` sets the other fields, such as initialization,
    precision and `remat`. At the small scales, `recipe` also sets the vocabulary and the sequence
    length, because these two depend on the data.

    Raises:
      ConfigError: if the grids do not have this group.
    """
    if group not in ("", "125M", "350M"):
        raise ConfigError(f"--group={group} must be 125M or 350M, the groups of the paper's rows.")
    found: Variants = {}
    base = recipe.config
    vocab_size = None if scale == "paper" else base.model.vocab_size
    for row in (row for grid in grids for row in grid_rows(grid, scale, group, vocab_size)):
        change = {f"model.{name}": getattr(row.model, name) for name in SHAPE}
        if base.model.scan_unroll > row.model.num_blocks:
            change["model.scan_unroll"] = row.model.num_blocks
        variant = recipe.changed(change)
        if row.length > 1:
            steps = variant.config.train.steps * row.length
            variant = variant.changed({"train.steps": steps})
        name = shape_name(row.model) + (f"-long{row.length}" if row.length > 1 else "")
        found.setdefault(name, variant)
    if not found:
        raise ConfigError(
            f"--group={group}: {', '.join(grids)} have no rows of this group; leave out --group."
        )
    return found


def vary(
    variants: Variants, fields: Mapping[str, Sequence[Any]], parameters: int | None = None
) -> Variants:
    """Returns each variant with each combination of the values in `fields`.

    `fields` maps a dotted field name to its values. If `parameters` is given, the function chooses
    the width of each model so that the model has this number of parameters.

    Raises:
      ConfigError: if a config does not accept a value, if `fields` contains a field that the solver
        sets, or if no width gives this number of parameters.
    """
    solved = [name for name in fields if name in SOLVED] if parameters else []
    if solved:
        raise ConfigError(
            f"--sweep={solved[0]} and --fixed_parameters={parameters} contradict each other, "
            f"because --fixed_parameters chooses {', '.join(SOLVED)}; leave one of the flags out."
        )
    changes = [dict(zip(fields, v, strict=True)) for v in itertools.product(*fields.values())]
    found = []
    for (base, old), change in itertools.product(variants.items(), changes):
        where = "".join(f"--sweep={name}={value}: " for name, value in change.items())
        try:
            recipe = old.changed(change)
            config = recipe.config  # This raises if the config breaks a rule.
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error
        if parameters:
            try:
                model = solve_width(config.model, parameters)
            except ConfigError as error:
                remedy = "" if base else _head_dim_that_works(old, changes, parameters)
                raise ConfigError(f"{where}{error}{remedy}") from error
            recipe = recipe.changed({name: getattr(model, name[6:]) for name in SOLVED})
        found.append((base, change, recipe))
    names = _folder_names([(base, change) for base, change, _ in found])
    return {name: recipe for name, (_, _, recipe) in zip(names, found, strict=True)}


def _head_dim_that_works(
    recipe: Recipe, changes: Sequence[Mapping[str, Any]], parameters: int
) -> str:
    """Returns a sentence with a head width that works for all models of the sweep, or ""."""
    name = "model.head_dim"
    now = recipe.config.model.head_dim
    for head_dim in (now // 2, now // 4, now // 8, *range(8, 2 * now + 1, 8)):
        try:
            for change in changes:
                if name in change:
                    return ""  # The sweep itself sets the head width.
                config = recipe.changed({**change, name: head_dim}).config
                solve_width(config.model, parameters)
        except ConfigError:
            continue
        return f" --config.{name}={head_dim} works for all models of this sweep."
    return ""


def _folder_names(models: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Returns a folder name for each model: a base, followed by the values of fields.

    A folder name has no slash, and some disks do not distinguish "Data" and "data". If a name is
    too long, or equal to another name on such a disk, a digest of the values replaces its end.

    Raises:
      ConfigError: if a model occurs twice.
    """
    texts = [
        "-".join(filter(None, [base, *(f"{n.split('.')[1]}={v}" for n, v in change.items())]))
        for base, change in models
    ]
    for text, number in Counter(texts).items():
        if number > 1:
            raise ConfigError(f"{text} occurs twice; give each --sweep value once.")
    plain = [re.sub(r"[^\w.=+-]+", "_", text) for text in texts]
    alike = Counter(name.casefold() for name in plain)
    names = []
    for text, name in zip(texts, plain, strict=True):
        if len(name.encode()) > _LONGEST_NAME or alike[name.casefold()] > 1:
            digest = hashlib.sha256(text.encode()).hexdigest()[:10]
            name = f"{name[:40]}-{digest}"
            _log.info(f"{name} is the model with {text}")
        names.append(name)
    return names


def with_seeds(variants: Variants, seeds: int, rates: Sequence[float] = ()) -> list[Run]:
    """Returns the runs of each variant with `seeds` seeds for initialization and data order.

    With `rates`, the runs with the first seed of a variant train at each learning rate. The runs
    with other seeds train at the rate with the lowest final validation loss. The list starts with
    the first seed of every variant, so a sweep that stops early has results for every variant.
    """
    runs = []
    for seed, (name, base) in itertools.product(range(seeds), variants.items()):
        first = base.config
        own = {"train.seed": first.train.seed + seed, "data.seed": first.data.seed + seed}
        recipe = base.changed(own)
        tuning = {f"{name}-lr{_rate_name(rate)}-s0": rate for rate in rates}
        if tuning and seed == 0:
            runs += [
                Run(name=tuned, config=recipe.changed({TUNED: rate}).config, model=name)
                for tuned, rate in tuning.items()
            ]
        else:
            own_name, tune_from = f"{name}-s{seed}", tuple(tuning)
            runs.append(Run(name=own_name, config=recipe.config, tune_from=tune_from, model=name))
    return runs


def _rate_name(rate: float) -> str:
    """Returns a rate as text: with six digits, as in old sweeps, if these are exact; else all."""
    return f"{rate:g}" if float(f"{rate:g}") == rate else repr(rate)
