from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from mobilellm_jax.train.plots import plot_losses

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # colors of training and validation


def pixels(path: Path, color: tuple[int, int, int]) -> int:
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 300 and image.shape[1] > 500
    return int((np.abs(image[..., :3] * 255 - np.array(color)).max(axis=-1) < 2).sum())


TRAINING = [{"step": s, "train/loss": 9 / s} for s in range(1, 50)]
VALIDATION = [{"step": s, "validation/loss": 10 / (s + 1), "validation/bpb": 1.0} for s in (0, 49)]


def test_both_curves_are_drawn_each_in_its_color(tmp_path: Path) -> None:
    both, training, validation = (tmp_path / f"{n}.png" for n in ("both", "train", "validation"))
    plot_losses([*VALIDATION, *TRAINING], both, "a run")
    plot_losses(TRAINING, training, "a run")
    plot_losses(VALIDATION, validation, "a run")
    assert pixels(both, BLUE) > 300
    assert pixels(both, ORANGE) > 300
    assert pixels(training, BLUE) > 300
    assert pixels(training, ORANGE) == 0
    assert pixels(validation, BLUE) == 0
    assert pixels(validation, ORANGE) > 300


# Warnings are errors in tests, so an empty picture must not warn of its empty legend.
@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "train/grad_norm": 1.0}, {"step": 2, "validation/bpb": 1.0}],
        [{"step": 1, "train/loss": float("nan")}],
        [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": float("inf")}],
    ],
)
def test_nothing_to_draw_is_an_empty_picture(
    records: list[dict[str, float]], tmp_path: Path
) -> None:
    plot_losses(records, tmp_path / "loss.png", "a run")
    assert pixels(tmp_path / "loss.png", ORANGE) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
