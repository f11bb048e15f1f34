import io
import json
import sys
import time
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.startup.messages import show_messages
from mobilellm_jax.train.metrics import (
    MetricsWriter,
    model_flops_utilization,
    peak_flops,
    plot_losses,
    read_metrics,
)


class Terminal(io.StringIO):
    """Text in memory that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


class Device:
    def __init__(self, kind: str) -> None:
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),  # its name begins with "TPU v5"
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("Tesla T4", None),
        ("The NVIDIA A100", None),
    ],
)
def test_peak_goes_by_the_start_of_the_devices_name(kind: str, peak: float | None) -> None:
    # The test calls `peak_flops` without its type check, because it cannot make a jax.Device.
    assert peak_flops.__wrapped__(Device(kind)) == peak


def test_mfu_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        vocab_size=100,
        embed_dim=10,
        num_blocks=2,
        num_repeats=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        ffn_dim=20,
    )
    # A block has 840 weights: 2 * 10 * 4 * (2 + 1) in attention, 3 * 10 * 20 in the feed-forward.
    # Six blocks and the head of 1,000 weights take 6 * 6,040. Attention takes 6 * 6 * 8 * 50.
    flops = 36_240 + 14_400
    assert model_flops_utilization(config, 50, 1e6) is None  # the device is a CPU
    eight = [Device("TPU v4")] * 8
    monkeypatch.setattr(jax, "devices", lambda: eight)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr("mobilellm_jax.train.metrics.peak_flops", peak_flops.__wrapped__)
    found = model_flops_utilization(config, 50, 2e10)
    assert found == pytest.approx(flops * 2e10 / (8 * 275e12), rel=1e-12)
    assert found == pytest.approx(0.4603636, rel=1e-6)


def test_records_are_on_disk_at_once_and_in_tensorboard(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, 10) as writer:
        writer.write(1, {"train/loss": 2.5})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 2.5}\n'
        writer.write(2, {"train/loss": 2.25, "train/attention": "xla", "train/grad_norm": 1.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [
            {"step": 1, "train/loss": 2.5},
            {"step": 2, "train/loss": 2.25, "train/attention": "xla", "train/grad_norm": 1.0},
        ]
    (events,) = (tmp_path / "tensorboard" / tmp_path.name).iterdir()
    content = events.read_bytes()
    assert content.count(b"train/loss") == 2
    assert content.count(b"train/grad_norm") == 1
    assert b"train/attention" not in content  # TensorBoard gets only numbers


def test_opening_cuts_the_record_back_to_the_first_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "train/loss": 1 / s}) + "\n" for s in (10, 20, 30)]
    # The run was killed while it wrote the record of step 40; its last checkpoint is step 20.
    path.write_text("".join(lines) + '{"step": 40, "tra')
    with MetricsWriter(tmp_path, 20, 100) as writer:
        assert path.read_text() == lines[0] + lines[1]
        writer.write(30, {"train/loss": 0.5})
    assert [r["step"] for r in read_metrics(path)] == [10, 20, 30]
    assert read_metrics(path)[-1]["train/loss"] == 0.5


def test_only_the_last_line_may_be_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: is not JSON"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"loss": 2}')  # whole, so no crash cut it off
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: "):
        read_metrics(path)


@pytest.mark.parametrize(
    "line", ["[1]", '{"loss": 1}', '{"step": "1"}', '{"step": 1, "train/loss": []}', "\xff"]
)
def test_a_record_that_is_none(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl.*Correct the line or delete it"):
        read_metrics(path)


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    passed = {"sec": 0.0}
    started = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: started + passed["sec"])
    with MetricsWriter(tmp_path, 0, 100) as writer:
        for step, passed["sec"] in ((1, 0.0), (2, 5.0), (3, 9.9), (4, 10.1), (5, 12.0), (6, 20.2)):
            writer.progress(step, f"loss {step}", 3725.9)
        writer.progress(100, "loss 0", None, force=True)
        writer.message("by the way")
    assert caplog.messages == [
        "step 1/100  loss 1  1:02:05 left",
        "step 4/100  loss 4  1:02:05 left",
        "step 6/100  loss 6  1:02:05 left",
        "step 100/100  loss 0",
        "by the way",
    ]


def test_on_a_terminal_progress_is_a_bar_below_the_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    show_messages()
    with MetricsWriter(tmp_path, 40, 100) as writer:
        assert "40/100" in terminal.getvalue()  # a resumed run starts at its first step
        drawn = len(terminal.getvalue())
        writer.message("by the way")
        # The bar is cleared before the message, and drawn again after it.
        cleared, _, after = terminal.getvalue()[drawn:].partition("by the way\n")
        assert set(cleared) == {"\r", " "}
        assert "40/100" in after
        writer.progress(100, "loss 0.5", 0.0)
    shown = terminal.getvalue()
    assert "100/100" in shown and "loss 0.5" in shown
    assert "left" not in shown


def test_absent_packages_do_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("matplotlib", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with MetricsWriter(tmp_path, 0, 10) as writer:
        writer.write(1, {"train/loss": 2.5})
    plot_losses(read_metrics(tmp_path / "metrics.jsonl"), tmp_path / "loss.png", "a run")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert caplog.messages == [
        "loss.png and tensorboard/ will not be written, because matplotlib and tensorboard cannot "
        "be imported; pip install 'mobilellm-jax[report,tensorboard]'."
    ]


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
    assert pixels(both, ORANGE) > 50  # two points, and one in the legend
    assert pixels(training, BLUE) > 300
    assert pixels(training, ORANGE) == 0
    assert pixels(validation, BLUE) == 0
    assert pixels(validation, ORANGE) > 50


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
