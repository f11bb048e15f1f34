import csv
import dataclasses
import io

import matplotlib.image
import pytest

from mobilellm_jax.benchmark.measure import Measurement
from mobilellm_jax.benchmark.table import as_csv, joules_per_token, markdown, plot, summarize
from mobilellm_jax.paper.architectures import MOBILELLM

MEASURED = Measurement(
    path="exported/q8",
    runtime="llama.cpp",
    precision="q8_0",
    model=MOBILELLM["350m"],
    model_bytes=380_000_000,
    load_sec=0.5,
    init_sec=0.25,
    prefill_sec=[0.5, 0.25, 4.0],
    decode_sec=[0.02, 0.01, 0.04],
    memory_bytes=400_000_000,
    loss=3.25,
)


def test_energy_is_the_papers_estimate() -> None:
    # The paper's Sec. 1 has 0.035 J/token for 350M in 8 bits; norms are not counted here.
    assert joules_per_token(MOBILELLM["350m"]) == pytest.approx(0.0345, abs=1e-4)
    twice = dataclasses.replace(MOBILELLM["350m"], num_repeats=2)
    head = 0.1 * 32_000 * 960 / 1e9
    once = joules_per_token(MOBILELLM["350m"]) - head
    assert joules_per_token(twice) == pytest.approx(head + 2 * once)


def test_medians_over_processes_and_rounds() -> None:
    slow = dataclasses.replace(MEASURED, load_sec=0.9, prefill_sec=[0.5, 0.5, 9.0])
    fast = dataclasses.replace(MEASURED, load_sec=0.1, decode_sec=[0.02] * 3)
    row = summarize([MEASURED, slow, fast], prompt_tokens=128)
    assert row.load_sec == 0.5
    assert row.prefill_tokens_per_sec == 128 / 0.5
    assert row.decode_tokens_per_sec == 1 / 0.02
    # The battery holds 50 kJ, and the phone writes 10 tokens/s.
    assert row.battery_hours == pytest.approx(50e3 / (10 * row.joules_per_token) / 3600)


def test_table_and_csv_hold_every_row() -> None:
    rows = [summarize([MEASURED], 128), summarize([dataclasses.replace(MEASURED, loss=4.0)], 128)]
    header, _, first, second, *_ = markdown(rows, "a text").splitlines()
    assert "J/token (est.)" in header and "battery h (est.)" in header
    assert "| q8 | llama.cpp | q8_0 | 380.00 | 8.8 | 0.500 |" in first
    assert "4.0000" in second
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [float(row["loss"]) for row in read] == [3.25, 4.0]


def test_the_picture_has_a_point_per_row() -> None:
    rows = [summarize([dataclasses.replace(MEASURED, loss=loss)], 128) for loss in (3.0, 4.0)]
    both, one = (
        matplotlib.image.imread(io.BytesIO(plot(some, "a text"))) for some in (rows, rows[:1])
    )
    assert both.shape[0] > 400 and (both != 1).sum() != (one != 1).sum()
