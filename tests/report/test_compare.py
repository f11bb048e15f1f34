import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.paper.grids import grid_rows
from mobilellm_jax.report.compare import count_verdicts, grid_tables, group_seeds, mean
from mobilellm_jax.report.runs import read_runs
from tests.report.conftest import BASE, seeded


def config_of(label: str) -> Config:
    (row,) = [r for r in grid_rows("sharing", "tiny") if r.label == label]
    shape = dataclasses.replace(row.model, compute_dtype="float32", attention="xla")
    return dataclasses.replace(BASE, model=shape)


def test_mean_and_interval_are_students() -> None:
    values = [3.1, 3.3, 3.2, 3.7]
    found = mean(values)
    assert found.value == pytest.approx(np.mean(values))
    assert found.standard_error == pytest.approx(scipy.stats.sem(values))
    low, high = scipy.stats.t.interval(0.95, 3, found.value, scipy.stats.sem(values))
    assert found.interval == pytest.approx((high - low) / 2)
    assert mean([1.0]).standard_error is None


def test_differences_are_taken_seed_by_seed(write_run: Callable[..., Path], tmp_path: Path) -> None:
    plain, twice = [4.0, 4.4, 4.2], [3.9, 4.31, 4.1]
    for seed in range(3):
        write_run(f"plain{seed}", seeded(config_of("not shared"), seed), plain[seed])
        write_run(f"twice{seed}", seeded(config_of("immediate, x2"), seed), twice[seed])
    tables = grid_tables(group_seeds(read_runs(str(tmp_path / "sweep"))[0]))
    assert [(t.grid, t.scale, len(t.rows)) for t in tables] == [
        ("sharing", "tiny", 2), ("repeats", "tiny", 2)
    ]  # fmt: skip
    baseline, row = tables[0].rows
    assert (baseline.row.label, baseline.difference, baseline.verdict) == ("not shared", None, "")
    assert row.difference is not None and row.difference.interval is not None
    test = scipy.stats.ttest_rel(twice, plain)
    interval = test.confidence_interval(0.95)
    assert row.difference.value == pytest.approx(np.mean(twice) - np.mean(plain))
    assert row.difference.value + row.difference.interval == pytest.approx(interval.high)
    # The error of the difference is small, because both models share the spread over seeds.
    assert row.model.loss.standard_error is not None
    assert row.model.loss.standard_error > 5 * (row.difference.standard_error or 1)
    assert (row.paper_score, row.paper_difference) == (45.0, 0.4)
    assert row.verdict == "same direction"
    assert tables[0].missing == ("repeat-all, x2", "reverse, x2")
    assert count_verdicts(tables) == {"same direction": 1}, "one comparison in two tables"


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([4.1, 4.51, 4.3], "opposite"),
        ([4.1, 4.3, 4.2], "within the spread"),
        ([3.9], "of one seed"),
    ],
)
def test_verdicts(
    ours: list[float], verdict: str, write_run: Callable[..., Path], tmp_path: Path
) -> None:
    for seed, loss in enumerate(ours):
        write_run(f"plain{seed}", seeded(config_of("not shared"), seed), [4.0, 4.4, 4.2][seed])
        write_run(f"twice{seed}", seeded(config_of("reverse, x2"), seed), loss)
    (table,) = grid_tables(group_seeds(read_runs(str(tmp_path / "sweep"))[0]))
    assert table.rows[1].verdict == verdict


def test_models_with_other_seeds_are_compared_by_both_errors(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    plain, twice = [4.0, 4.4, 4.2], [3.9, 4.3]
    for seed, loss in enumerate(plain):
        write_run(f"plain{seed}", seeded(config_of("not shared"), seed), loss)
    for seed, loss in enumerate(twice):
        write_run(f"twice{seed}", seeded(config_of("reverse, x2"), seed), loss)
    (table,) = grid_tables(group_seeds(read_runs(str(tmp_path / "sweep"))[0]))
    error = np.hypot(scipy.stats.sem(plain), scipy.stats.sem(twice))
    assert table.rows[1].difference is not None
    assert table.rows[1].difference.standard_error == pytest.approx(error)


def test_each_setting_has_its_own_tables(write_run: Callable[..., Path], tmp_path: Path) -> None:
    for decay in (0.0, 0.1):
        optimizer = dataclasses.replace(BASE.optimizer, weight_decay=decay)
        for label in ("not shared", "immediate, x2"):
            config = dataclasses.replace(config_of(label), optimizer=optimizer)
            write_run(f"{label}{decay}", config, 4.0)
    models = group_seeds(read_runs(str(tmp_path / "sweep"))[0])
    assert sorted(m.name for m in models)[0] == "4x128-h8kv8-f400 weight_decay=0.0"
    tables = grid_tables(models)
    assert {table.setting for table in tables} == {"weight_decay=0.0", "weight_decay=0.1"}


def test_a_tuned_row_shows_the_rate_with_most_seeds(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    losses = {1e-3: [3.0], 1e-2: [3.5, 3.6], 1e-1: [3.7, 3.9]}
    for rate, values in losses.items():
        optimizer = dataclasses.replace(BASE.optimizer, peak_lr=rate)
        for seed, loss in enumerate(values):
            config = dataclasses.replace(config_of("immediate, x2"), optimizer=optimizer)
            write_run(f"{rate}-{seed}", seeded(config, seed), loss)
    write_run("plain", config_of("not shared"), 4.0)
    tables = grid_tables(group_seeds(read_runs(str(tmp_path / "sweep"))[0]))
    assert tables[0].rows[1].model.config.optimizer.peak_lr == 1e-2


def test_unfinished_runs_are_in_no_table(all_tiny: Path) -> None:
    runs = read_runs(str(all_tiny))[0]
    assert len(runs) == 62
    models = group_seeds(runs)
    assert len(models) == 20 and all(len(model.runs) == 3 for model in models)
    assert [len(table.rows) for table in grid_tables(models)] == [6, 6, 3, 5, 4, 4]


def test_speed_is_the_median_over_the_run(write_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_run("plain", config_of("not shared"), 4.0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2000, "train/tokens_per_sec": 4000.0}\n')
    (run,) = read_runs(str(tmp_path / "sweep"))[0]
    # An even number of values has two middle values; the median is their mean.
    assert run.tokens_per_sec == 2500.0


def test_a_diverged_run_is_in_no_table(write_run: Callable[..., Path], tmp_path: Path) -> None:
    write_run("plain", config_of("not shared"), 4.0)
    write_run("twice", config_of("reverse, x2"), math.nan)
    runs = read_runs(str(tmp_path / "sweep"))[0]
    assert [run.state for run in runs] == ["finished", "diverged"]
    assert [model.name for model in group_seeds(runs)] == ["4x128-h8kv8-f400"]


def test_a_pattern_without_run_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="matches no run folder"):
        read_runs(str(tmp_path / "*"))
