"""The pictures show the numbers of the runs in colours that stand out from the background."""

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mobilellm_jax.report import figures
from mobilellm_jax.report.colors import DARK, LIGHT
from mobilellm_jax.report.compare import Model, Table, grid_tables, group_seeds
from mobilellm_jax.report.runs import read_runs


@pytest.fixture(scope="module")
def models(all_tiny: Path) -> list[Model]:
    return group_seeds(read_runs(str(all_tiny))[0])


@pytest.fixture(scope="module")
def table(models: list[Model]) -> Table:
    return next(table for table in grid_tables(models) if table.grid == "depth_width")


@pytest.fixture
def axes_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[Axes]]:
    """Returns a function that returns the axes of a picture for a light page."""

    def axes_of(make: Callable[[], object]) -> list[Axes]:
        drawn: list[Figure] = []
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
            make()
        return drawn[0].axes

    return axes_of


def test_curves_are_means_over_seeds_in_a_band_from_least_to_most(
    table: Table, axes_of: Callable[[Callable[[], object]], list[Axes]]
) -> None:
    labelled = [(row.row.label, row.model) for row in table.rows]
    (axes,) = axes_of(lambda: figures.curves("curves", labelled))
    assert len(axes.lines) == len(axes.collections) == len(labelled)
    for line, band, (label, model) in zip(axes.lines, axes.collections, labelled, strict=True):
        assert line.get_label() == label
        values = np.array([[run.validation[s] for s in (500, 1000, 1500, 2000)]
                           for run in model.runs])  # fmt: skip
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        np.testing.assert_allclose(x, np.array([500, 1000, 1500, 2000]) * 8 * 256 / 1e6)
        np.testing.assert_allclose(y, values.mean(0))
        box = band.get_datalim(axes.transData)
        assert (box.y0, box.y1) == pytest.approx((values.min(), values.max()))


def test_depth_shows_our_losses_and_the_papers_scores(
    table: Table, axes_of: Callable[[Callable[[], object]], list[Axes]]
) -> None:
    ours, paper = axes_of(lambda: figures.depth("depth", table))
    blocks = [2, 4, 6, 9, 15, 21]
    assert list(np.asarray(ours.lines[0].get_xdata())) == blocks
    losses = [row.model.loss for row in table.rows]
    assert list(np.asarray(ours.lines[0].get_ydata())) == [loss.value for loss in losses]
    (bars,) = ours.collections
    for segment, loss in zip(bars.get_segments(), losses, strict=True):
        assert loss.standard_error is not None
        assert np.ptp(segment[:, 1]) == pytest.approx(2 * loss.standard_error)
    # The scores are in Table 11, in the rows of 125M that our rows stand for.
    assert list(np.asarray(paper.lines[0].get_ydata())) == [row.paper_score for row in table.rows]
    assert [text.get_text() for text in ours.figure.legends[0].get_texts()] == [
        "ours: loss (left axis, upside down)",
        "paper: mean score (right axis)",
    ]
    # Up is better on both axes.
    assert ours.yaxis.get_inverted() and not paper.yaxis.get_inverted()


def test_points_are_numbered_as_the_table_of_all_models(
    models: list[Model], axes_of: Callable[[Callable[[], object]], list[Axes]]
) -> None:
    (axes,) = axes_of(lambda: figures.speed(models))
    found = [(float(x[0]), float(y[0])) for x, y in (line.get_data() for line in axes.lines)]
    assert found == [(1000.0, model.loss.value) for model in models]
    (axes,) = axes_of(lambda: figures.memory(models))
    found = [(float(x[0]), float(y[0])) for x, y in (line.get_data() for line in axes.lines)]
    assert found == [(model.parameters / 1e6, 500.0) for model in models]
    assert [text.get_text() for text in axes.texts] == [str(n + 1) for n in range(len(models))]
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(looks) == len(models)


def test_both_pages_show_every_curve_in_its_own_colour(table: Table) -> None:
    labelled = [(row.row.label, row.model) for row in table.rows]
    picture = figures.curves("curves", labelled)
    for theme, png in ((LIGHT, picture.light), (DARK, picture.dark)):
        pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
        assert np.allclose(pixels[0, 0], matplotlib.colors.to_rgb(theme.background), atol=0.01)
        for color in theme.series[: len(labelled)]:
            near = np.abs(pixels - matplotlib.colors.to_rgb(color)).max(-1) < 0.02
            assert near.sum() > 300, color
