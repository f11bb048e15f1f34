"""Runs put beside each other: seeds to means, rows to grids, differences to directions.

A difference is taken seed by seed where both models have the same seeds, which start from the same
numbers of the generator and read the same batches; its standard error is that of the mean of these
differences. It counts as a direction where a 95% interval (Student's t) leaves out zero.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from scipy.special import stdtrit

from mobilellm_jax import config as config_lib
from mobilellm_jax.config import Config
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.paper.grids import (
    GRIDS,
    SCALES,
    GridName,
    GridRow,
    ScaleName,
    architecture,
    grid_rows,
    shape_name,
)
from mobilellm_jax.preflight import MAY_CHANGE
from mobilellm_jax.report.runs import Measured

_SEEDS = {"train.seed", "data.seed"}
_SHAPE = {
    *("model.embed_dim", "model.num_blocks", "model.num_repeats", "model.sharing"),
    *("model.num_heads", "model.num_kv_heads", "model.head_dim", "model.ffn_dim"),
    *("model.activation", "model.tie_embeddings", "model.vocab_size", "model.scan_unroll"),
}
_RATE = "optimizer.peak_lr"
# What may change on resume changes no result, these apart.
_NO_RESULT = (MAY_CHANGE - {"train.steps", "data.path", "train.spike_factor"}) | _SEEDS

Verdict = Literal[
    "same direction", "opposite", "within the spread", "of one seed", "paper: no difference", ""
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds."""

    value: float
    standard_error: float | None  # None of a single one
    count: int

    @property
    def interval(self) -> float | None:
        """Half of the 95% confidence interval."""
        if self.standard_error is None:
            return None
        return float(stdtrit(self.count - 1, 0.975)) * self.standard_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A config with its seeds; all of these runs have finished."""

    name: str
    config: Config  # of one of them
    runs: tuple[Measured, ...]

    @property
    def parameters(self) -> int:
        return parameter_count(self.config.model)

    @property
    def loss(self) -> Mean:
        return mean([run.loss for run in self.runs])

    @property
    def bpb(self) -> float | None:
        found = [run.bpb for run in self.runs if run.bpb is not None]
        return math.fsum(found) / len(found) if found else None

    @property
    def tokens_per_sec(self) -> float | None:
        found = [run.tokens_per_sec for run in self.runs if run.tokens_per_sec is not None]
        return math.fsum(found) / len(found) if found else None

    @property
    def peak_bytes(self) -> int | None:
        return max((run.peak_bytes for run in self.runs if run.peak_bytes), default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """A row of a grid with its paper row."""

    row: GridRow
    model: Model
    difference: Mean | None  # of loss from the row it is compared with; less is better
    paper_score: float
    paper_difference: float | None  # of points; more is better
    verdict: Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A grid as far as it was run."""

    grid: GridName
    scale: ScaleName
    group: str  # 125M or 350M
    rows: tuple[Compared, ...]
    missing: tuple[str, ...]  # labels of rows without finished runs
    setting: str  # what tells it from another table of the same grid; "" = nothing does


def mean(values: Sequence[float]) -> Mean:
    """Returns the mean and its standard error."""
    count = len(values)
    value = math.fsum(values) / count
    if count == 1:
        return Mean(value=value, standard_error=None, count=1)
    variance = math.fsum((v - value) ** 2 for v in values) / (count - 1)
    return Mean(value=value, standard_error=math.sqrt(variance / count), count=count)


def group_seeds(runs: Sequence[Measured]) -> list[Model]:
    """Returns the models of the finished runs, named by what tells them apart."""
    groups: dict[str, list[Measured]] = {}
    for run in runs:
        if run.is_finished:
            groups.setdefault(_without(run.config, _NO_RESULT), []).append(run)
    found = list(groups.values())
    varying = _varying([group[0].config for group in found])
    shapes = [shape_name(group[0].config.model) for group in found]
    return [
        Model(
            name=" ".join([shape, *_written(group[0].config, varying - _SHAPE)]),
            config=group[0].config,
            runs=tuple(sorted(group, key=lambda run: run.config.train.seed)),
        )
        for shape, group in zip(shapes, found, strict=True)
    ]


def grid_tables(models: Sequence[Model]) -> list[Table]:
    """Returns the tables of all grids of which there are two rows or more.

    Where models differ in more than a grid does (another optimizer, say), each setting has tables
    of its own. Where a model was trained at several learning rates, the row has the one with most
    seeds, and of these the best: that is how `sweep --tune_lr` leaves them.
    """
    extra = _varying([m.config for m in models]) - _SHAPE - {_RATE, "train.steps"}
    settings: dict[str, list[Model]] = {}
    for model in models:
        settings.setdefault(", ".join(_written(model.config, extra)), []).append(model)
    return [table for name, part in settings.items() for table in _tables_of(part, name)]


def count_verdicts(tables: Sequence[Table]) -> Counter[Verdict]:
    """Returns how many comparisons came out how; one that two grids make counts once."""
    verdicts: dict[tuple[str, str], Verdict] = {}
    for table in tables:
        names = {compared.row.label: compared.model.name for compared in table.rows}
        for compared in table.rows:
            if compared.verdict:
                pair = (compared.model.name, names[compared.row.compared_with])
                verdicts[pair] = compared.verdict
    return Counter(verdicts.values())


def _tables_of(models: Sequence[Model], setting: str) -> Iterator[Table]:
    steps = Counter(model.config.train.steps for model in models).most_common(1)[0][0]
    vocab_size = models[0].config.model.vocab_size
    for scale in SCALES:
        for grid in GRIDS:
            rows = grid_rows(grid, scale, "", None if scale == "paper" else vocab_size)
            for group in dict.fromkeys(row.group for row in rows):
                wanted = [row for row in rows if row.group == group]
                found = {
                    row.label: model
                    for row in wanted
                    if (model := _model_of(row, models, steps * row.length)) is not None
                }
                if len(found) > 1:
                    yield Table(
                        grid=grid,
                        scale=scale,
                        group=group,
                        rows=tuple(
                            _compared(row, found, wanted) for row in wanted if row.label in found
                        ),
                        missing=tuple(row.label for row in wanted if row.label not in found),
                        setting=setting,
                    )


def _model_of(row: GridRow, models: Sequence[Model], steps: int) -> Model | None:
    same = [
        model
        for model in models
        if architecture(model.config.model) == architecture(row.model)
        and model.config.train.steps == steps
    ]
    return min(same, key=lambda m: (-len(m.runs), m.loss.value), default=None)


def _compared(row: GridRow, found: dict[str, Model], rows: Sequence[GridRow]) -> Compared:
    model, score = found[row.label], row.paper.scores["average"]
    reference = found.get(row.compared_with)
    difference = None if reference is None else _difference(model, reference)
    before = [r.paper.scores["average"] for r in rows if r.label == row.compared_with]
    paper_difference = round(score - before[0], 1) if before else None
    return Compared(
        row=row,
        model=model,
        difference=difference,
        paper_score=score,
        paper_difference=paper_difference,
        verdict=_verdict(difference, paper_difference),
    )


def _difference(model: Model, reference: Model) -> Mean:
    ours = {run.config.train.seed: run.loss for run in model.runs}
    theirs = {run.config.train.seed: run.loss for run in reference.runs}
    if ours.keys() == theirs.keys():
        return mean([ours[seed] - theirs[seed] for seed in ours])
    # Not the same seeds: the errors of both means, with the fewer seeds' freedom.
    one, other = model.loss, reference.loss
    errors = (one.standard_error, other.standard_error)
    error = None if None in errors else math.hypot(*(e for e in errors if e is not None))
    value = one.value - other.value
    return Mean(value=value, standard_error=error, count=min(one.count, other.count))


def _verdict(difference: Mean | None, paper: float | None) -> Verdict:
    if difference is None or paper is None:
        return ""
    if paper == 0:
        return "paper: no difference"
    interval = difference.interval
    if interval is None:
        return "of one seed"
    if abs(difference.value) <= interval:
        return "within the spread"
    # A lower loss is better, and so is a higher score.
    return "same direction" if (difference.value < 0) == (paper > 0) else "opposite"


def _varying(configs: Sequence[Config]) -> set[str]:
    return {
        name
        for config in configs[1:]
        for name in config_lib.changed_fields(configs[0], config)
        if name not in _NO_RESULT
    }


def _written(config: Config, names: set[str]) -> list[str]:
    return [f"{name.split('.')[1]}={_value(config, name)}" for name in sorted(names)]


def _without(config: Config, names: set[str] | frozenset[str]) -> str:
    kept = sorted(set(config_lib.field_types()) - names)
    return repr([_value(config, name) for name in kept])


def _value(config: Config, name: str) -> Any:
    group, field = name.split(".")
    return getattr(getattr(config, group), field)
