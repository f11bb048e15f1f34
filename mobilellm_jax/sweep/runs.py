"""Lists the runs of a sweep: rows of grids x values of fields x learning rates x seeds."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.model.size import flops_per_token
from mobilellm_jax.paper.grids import GridName, ScaleName, grid_rows, shape_name
from mobilellm_jax.paper.width import SOLVED, solve_width
from mobilellm_jax.plan.fit import changed

_SHAPE = (
    *("vocab_size", "embed_dim", "num_blocks", "num_repeats", "sharing", "num_heads"),
    *("num_kv_heads", "head_dim", "ffn_dim", "activation", "tie_embeddings"),
)
_TUNED = "optimizer.peak_lr"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a sweep."""

    name: str  # also the name of its folder
    config: Config
    # Names of runs of the same model at other learning rates. This run takes the rate of the best
    # of these runs, and ignores `optimizer.peak_lr` in `config`.
    tune_from: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """The model FLOPs of the whole training."""
        return float(tokens_of(self.config)) * flops_per_token(
            self.config.model, self.config.data.seq_len
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A config of a sweep, before seeds are set."""

    name: str
    config: Config


def tokens_of(config: Config) -> int:
    """Returns the number of tokens that a run trains on."""
    return config.train.steps * config.train.global_batch * config.data.seq_len


def grid_variants(
    base: Config, grids: Iterable[GridName], scale: ScaleName, group: str = ""
) -> list[Variant]:
    """Returns the rows of the grids with the recipe of `base`; a row of several grids comes once.

    The row sets the shape of the model. `base` sets the other model fields, such as initialization,
    precision and `remat`. At the small scales, `base` also sets the vocabulary and the sequence
    length, because they depend on the data.

    Raises:
      ConfigError: if the grids do not have this group.
    """
    if group not in ("", "125M", "350M"):
        raise ConfigError(f"--group={group} must be 125M or 350M, the groups of the paper's rows.")
    found: dict[str, Variant] = {}
    vocab_size = None if scale == "paper" else base.model.vocab_size
    for grid in grids:
        for row in grid_rows(grid, scale, group, vocab_size):
            shape = {name: getattr(row.model, name) for name in _SHAPE}
            # The recipe may put every block into the loop's body, because the body of a small model
            # is small.
            unroll = min(base.model.scan_unroll, row.model.num_blocks)
            model = dataclasses.replace(base.model, **shape, scan_unroll=unroll)
            train = dataclasses.replace(base.train, steps=base.train.steps * row.length)
            name = shape_name(model) + (f"-long{row.length}" if row.length > 1 else "")
            config = dataclasses.replace(base, model=model, train=train)
            found.setdefault(name, Variant(name=name, config=config))
    if grids and not found:
        raise ConfigError(
            f"--group={group}: no such rows in {', '.join(grids)}; leave out --group."
        )
    return list(found.values())


def vary(
    variants: Sequence[Variant],
    fields: Mapping[str, Sequence[Any]],
    parameters: int | None = None,
) -> list[Variant]:
    """Returns every variant with every combination of values of the fields.

    Args:
      variants: the configs to change.
      fields: values by dotted field name.
      parameters: solve the width for this number of parameters. None: keep the widths.

    Raises:
      ConfigError: if a config does not accept a value, if `fields` contains a field that the solver
        sets, or if no width gives this number of parameters.
    """
    solved = [name for name in fields if name in SOLVED] if parameters else []
    if solved:
        raise ConfigError(
            f"--sweep={solved[0]} and --fixed_parameters={parameters} contradict each other: "
            f"{', '.join(SOLVED)} are what is solved for; leave one of the two out."
        )
    found: dict[str, Variant] = {}
    for variant, values in itertools.product(variants, itertools.product(*fields.values())):
        change = dict(zip(fields, values, strict=True))
        try:
            config = changed(variant.config, change)
            if parameters:
                model = solve_width(config.model, parameters)
                config = dataclasses.replace(config, model=model)
        except ConfigError as error:
            where = ", ".join(f"--sweep={name}={value}" for name, value in change.items())
            raise ConfigError(f"{where}: {error}") from error
        parts = [variant.name, *(f"{name.split('.')[1]}={value}" for name, value in change.items())]
        name = _plain("-".join(part for part in parts if part))
        if name in found:
            raise ConfigError(f"{name} occurs twice; give each --sweep value once.")
        found[name] = Variant(name=name, config=config)
    return list(found.values())


def with_seeds(variants: Sequence[Variant], seeds: int, rates: Sequence[float] = ()) -> list[Run]:
    """Returns the runs: every variant with `seeds` seeds for initialization and data order.

    With `rates`, the first seed of a variant trains at each rate. The other seeds train at the rate
    with the lowest final validation loss. The first seeds of all variants come first, so a sweep
    that stops early has results for every variant.
    """
    runs = []
    for seed, variant in itertools.product(range(seeds), variants):
        config = _seeded(variant.config, seed)
        tuning = {f"{variant.name}-lr{rate:g}-s0": rate for rate in rates}
        if not rates:
            runs.append(Run(name=f"{variant.name}-s{seed}", config=config))
        elif seed == 0:
            runs += [
                Run(name=name, config=changed(config, {_TUNED: rate}))
                for name, rate in tuning.items()
            ]
        else:
            runs.append(Run(name=f"{variant.name}-s{seed}", config=config, tune_from=tuple(tuning)))
    return runs


def _seeded(config: Config, seed: int) -> Config:
    train, data = config.train, config.data
    return changed(config, {"train.seed": train.seed + seed, "data.seed": data.seed + seed})


def _plain(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name)
