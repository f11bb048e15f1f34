"""`mobilellm sweep`: what it refuses, what it plans, what it costs."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import pytest

from mobilellm_jax.cli.main import main
from mobilellm_jax.plan import prediction
from mobilellm_jax.plan.compiled import CompiledStep
from mobilellm_jax.plan.hlo import Program
from mobilellm_jax.processes import source_digest
from mobilellm_jax.sweep import chip_hours

ROOT = Path(__file__).parent.parent.parent
QUICK = "--config=configs/quickstart.py"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--grid and --sweep are both missing"),
        (("--grid=depth_with",), "--grid=depth_with must be one of .* Did you mean depth_width?"),
        (("--grid=heads", "--scale=teeny"), "--scale=teeny must be one of .* Did you mean tiny?"),
        (("--sweep=model.num_blocks=2",), "--config is missing"),
        ((QUICK, "--sweep=model.num_block=2"), "Did you mean model.num_blocks?"),
        ((QUICK, "--sweep=model.num_blocks"), "must be a field and its values"),
        ((QUICK, "--sweep=model.num_blocks=2.5"), "must be a whole number"),
        ((QUICK, "--sweep=data.seed=1", "--sweep=data.seed=2"), "is given twice"),
        ((QUICK, "--sweep=optimizer.peak_lr=1", "--tune_lr=1"), "contradict each other"),
        ((QUICK, "--sweep=data.seed=1", "--tune_lr=1e-3,1e-3"), "has 1e-3 twice"),
        (("--grid=heads", "--topology=v5e:2x2"), "--topology=v5e:2x2 needs --plan"),
        (("--grid=heads", "--config.train.init_from=x"), "train.init_from='x'"),
        (("--grid=all", "--scale=paper"), "data.path='data/pretrain' does not exist"),
    ],
)
def test_what_is_refused(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    assert main(["sweep", f"--workdir={sweep}", *flags]) == 2
    errors = capsys.readouterr().err
    assert _matches(message, errors), errors
    assert not sweep.exists()


def _matches(message: str, text: str) -> bool:
    first, _, second = message.partition(" .* ")
    return first in text and second in text


def test_a_plan_counts_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--grid=sharing,repeats", "--seeds=3", "--plan", "--flops_per_sec=1e10"]
    missing = f"--config.data.path={tmp_path / 'none'}"
    assert main(["sweep", f"--workdir={tmp_path / 'sweep'}", *flags, missing]) == 0
    errors = capsys.readouterr().err
    row = "4x128-h8kv8-f400-immediate4      3      1,401,984          819,200"
    assert row in errors
    assert (
        "18 runs, " in errors
        and " TFLOP in all" in errors
        and "0 finished, 0 started, 0 failed" in errors
    )
    # 18 runs at 10 GFLOP/s: FLOPs, evaluations of a third of a step, and starts.
    assert (
        "on 1 x this machine (at 1e+10 FLOP/s, stated; evaluations and starts included)" in errors
    )
    assert not (tmp_path / "none").exists() and not (tmp_path / "sweep" / "runs" / "x").exists()


def test_a_grid_is_priced_for_a_slice_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = []

    def compile_step(*_: Any) -> CompiledStep:
        compiled.append(1)
        return CompiledStep(2**30, 2**30, 2**31, Program((), 3 * 10**8, {}, 0), 61.0)

    monkeypatch.setattr(chip_hours, "topology_devices", lambda topology: jax.devices()[:4])
    monkeypatch.setattr(prediction, "peak_flops", lambda device: 197e12)
    monkeypatch.setattr(chip_hours, "compile_step", compile_step)
    monkeypatch.setattr(prediction, "account_of", _account)
    command = ["sweep", "--grid=embedding", "--scale=paper", "--plan", "--topology=v5e:2x2"]
    command += [f"--workdir={tmp_path}", "--seeds=2", "--mfu=0.5"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert len(compiled) == 3, "seeds share a step"
    # 197e12 model FLOPs a chip and step: a second at the peak, two at half of it.
    hours = 120_000 * 2 * 4 * 2 / 3600
    predicted = 120_000 * 1 * 4 * 2 / 3600  # at least a second, by the roofline
    row = (
        f"| 30x512-h8kv8-f1536-tied | 2 | 118,651,392 | 120,000 | none | 2.0 | 100% | {hours:,.0f}"
    )
    assert f"{row} | {predicted:,.0f} |" in out
    assert f"| all | 6 | | | | | | {3 * hours:,.0f} | {3 * predicted:,.0f} |" in out
    assert "Nothing was measured" in out
    assert (tmp_path / "chip-hours-v5e-2x2.md").read_text() == out
    assert main(command) == 0
    assert len(compiled) == 3, "what was compiled is kept"
    assert len(json.loads((tmp_path / "compiled-v5e-2x2.json").read_text())) == 3
    monkeypatch.setattr(chip_hours, "_code", lambda: "another")
    assert main(command) == 0
    assert len(compiled) == 6, "by another compiler it may be another program"


def test_steps_follow_from_sources_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mobilellm_jax"
    for name in ("model/a.py", "quantize/a.py", "train/a.py", "plan/a.py", "report/a.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1")
    (package / "sharding.py").write_text("1")
    monkeypatch.setattr(source_digest, "__file__", str(package / "processes" / "source_digest.py"))
    versions = {"jax": "0.10.2", "flax": "0.12", "optax": "0.2"}

    def version(library: str) -> str:
        if library not in versions:
            raise metadata.PackageNotFoundError(library)
        return versions[library]

    monkeypatch.setattr(metadata, "version", version)
    found = []
    for change in (
        lambda: None,
        lambda: (package / "report" / "a.py").write_text("2"),
        lambda: (package / "model" / "a.py").write_text("2"),
        lambda: (package / "sharding.py").write_text("2"),
        lambda: versions.update(libtpu="0.0.42"),
        lambda: versions.update(jax="0.11"),
    ):
        change()
        chip_hours._code.cache_clear()
        found.append(chip_hours._code())
    chip_hours._code.cache_clear()
    assert found[0] == found[1], "the report compiles nothing"
    assert len(set(found)) == 5


class _account:  # noqa: N801  # stands for a function
    """Of a step with 197 TFLOP of a chip."""

    def __init__(self, *_: Any) -> None:
        self.flops_per_step = 197e12
        self.rows = 1
