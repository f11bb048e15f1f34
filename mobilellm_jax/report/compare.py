"""Compares runs: computes means over seeds, and differences between rows of the paper's grids.

If two models were trained with the same seeds, this module subtracts their losses seed by seed,
because two runs with the same seed start from the same random numbers and read the same batches.
The difference of the models is the mean of these differences, with the standard error of this mean.
A difference has a direction if its 95% confidence interval (Student's t) does not contain zero.
"""

import dataclasses
import math
import operator
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from mobilellm_jax import config as config_lib
from mobilellm_jax.config import Config
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.paper.grids import (
    GRIDS,
    SCALES,
    SHAPE,
    GridName,
    GridRow,
    ScaleName,
    architecture,
    grid_rows,
    shape_name,
)
from mobilellm_jax.report.runs import Measured
from mobilellm_jax.run_record import NO_RESULT

_SHAPE = {f"model.{name}" for name in (*SHAPE, "scan_unroll")}
_RATE = "optimizer.peak_lr"

Verdict = Literal[
    "same direction", "opposite", "within the spread", "of one seed", "paper: no difference", ""
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds."""

    value: float
    standard_error: float | None  # None if there is only one value.
    count: int

    @property
    def interval(self) -> float | None:
        """Half the width of the 95% confidence interval."""
        from scipy.special import stdtrit

        if self.standard_error is None:
            return None
        return float(stdtrit(self.count - 1, 0.975)) * self.standard_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The finished runs of one model, which differ only in their seeds."""

    name: str
    config: Config  # Config of one of the runs.
    runs: tuple[Measured, ...]

    @property
    def history(self) -> str:
        """A difference in the history of the runs that the config does not show, or ""."""
        step = self.runs[0].other_schedule_until
        return f"other schedule until step {step}" if step else ""

    @property
    def parameters(self) -> int:
        return parameter_count(self.config.model)

    @property
    def loss(self) -> Mean:
        return mean([run.loss for run in self.runs])

    @property
    def bpb(self) -> float | None:
        return _mean_of_known([run.bpb for run in self.runs])

    @property
    def tokens_per_sec(self) -> float | None:
        return _mean_of_known([run.tokens_per_sec for run in self.runs])

    @property
    def peak_bytes(self) -> int | None:
        return max((run.peak_bytes for run in self.runs if run.peak_bytes), default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """Our results for a row of a grid, and the paper's results for the same row."""

    row: GridRow
    model: Model
    difference: Mean | None  # Loss minus the loss of the reference row; negative is better.
    paper_score: float
    paper_difference: float | None  # Difference in percentage points; positive is better.
    verdict: Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a grid that have finished runs."""

    grid: GridName
    scale: ScaleName
    group: str  # Group of the paper's rows: 125M or 350M.
    rows: tuple[Compared, ...]
    missing: tuple[str, ...]  # Labels of the rows without finished runs.
    setting: str  # Values that only this table of the grid has; "" if there is one table.


def mean(values: Sequence[float]) -> Mean:
    """Returns the mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(value=statistics.fmean(values), standard_error=error, count=len(values))


def group_seeds(runs: Sequence[Measured]) -> list[Model]:
    """Groups finished runs into models; a model's name shows the fields that differ.

    The runs of a model differ only in their seeds. A run that was continued with a larger
    `train.steps` is another model, because its learning rate followed two schedules.
    """
    names = sorted(config_lib.field_types().keys() - NO_RESULT)
    groups: dict[str, list[Measured]] = {}
    for run in runs:
        if run.is_finished:
            settings = [operator.attrgetter(name)(run.config) for name in names]
            groups.setdefault(repr([*settings, run.other_schedule_until]), []).append(run)
    varying = _varying([group[0].config for group in groups.values()]) - _SHAPE
    models = []
    for group in groups.values():
        config = group[0].config
        model = Model(
            name=" ".join([shape_name(config.model), *_written(config, varying)]),
            config=config,
            runs=tuple(sorted(group, key=lambda run: run.config.train.seed)),
        )
        if model.history:
            model = dataclasses.replace(model, name=f"{model.name}, {model.history}")
        models.append(model)
    return models


def grid_tables(models: Sequence[Model]) -> list[Table]:
    """Returns a table for each grid that has at least two rows with finished runs.

    If models differ in a field that no grid varies (the optimizer, for example), or have had
    another schedule at first, the result has separate tables. If a model was trained at several
    learning rates, its row shows the rate with the most seeds, because `sweep --tune_lr` trains
    more seeds at the best rate. If several rates have equally many seeds, the row shows the rate
    with the lowest loss.
    """
    extra = _varying([m.config for m in models]) - _SHAPE - {_RATE, "train.steps"}
    settings: dict[str, list[Model]] = {}
    for model in models:
        parts = [*_written(model.config, extra), model.history]
        settings.setdefault(", ".join(filter(None, parts)), []).append(model)
    return [table for name, part in settings.items() for table in _tables_of(part, name)]


def count_verdicts(tables: Sequence[Table]) -> Counter[Verdict]:
    """Counts the verdicts; a pair of models that two grids compare counts only once."""
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
                wanted = {row.label: row for row in rows if row.group == group}
                found = {
                    label: model
                    for label, row in wanted.items()
                    if (model := _model_of(row, models, steps * row.length)) is not None
                }
                if len(found) > 1:
                    yield Table(
                        grid=grid,
                        scale=scale,
                        group=group,
                        rows=tuple(_compared(wanted[label], found, wanted) for label in found),
                        missing=tuple(label for label in wanted if label not in found),
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


def _compared(row: GridRow, found: dict[str, Model], rows: dict[str, GridRow]) -> Compared:
    score = row.paper.scores["average"]
    difference = paper_difference = None
    if row.compared_with in rows:
        paper_difference = round(score - rows[row.compared_with].paper.scores["average"], 1)
    if row.compared_with in found:
        difference = _difference(found[row.label], found[row.compared_with])
    return Compared(
        row=row,
        model=found[row.label],
        difference=difference,
        paper_score=score,
        paper_difference=paper_difference,
        verdict=_verdict(difference, paper_difference),
    )


def _difference(model: Model, reference: Model) -> Mean:
    ours, theirs = ({r.config.train.seed: r.loss for r in m.runs} for m in (model, reference))
    if ours.keys() == theirs.keys():
        return mean([ours[seed] - theirs[seed] for seed in ours])
    # If the seeds differ, the squared standard errors are added. The smaller number of runs then
    # determines the degrees of freedom.
    one, other = model.loss, reference.loss
    error = None
    if one.standard_error is not None and other.standard_error is not None:
        error = math.hypot(one.standard_error, other.standard_error)
    count = min(one.count, other.count)
    return Mean(value=one.value - other.value, standard_error=error, count=count)


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
    # A lower loss and a higher score are both improvements.
    return "same direction" if (difference.value < 0) == (paper > 0) else "opposite"


def _varying(configs: Sequence[Config]) -> set[str]:
    changed = (config_lib.changed_fields(configs[0], config) for config in configs[1:])
    return {name for names in changed for name in names} - NO_RESULT


def _written(config: Config, names: set[str]) -> list[str]:
    return [f"{n.split('.')[1]}={operator.attrgetter(n)(config)}" for n in sorted(names)]


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
