import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax import plan as planning
from mobilellm_jax.cli.main import main
from mobilellm_jax.config import changed
from mobilellm_jax.plan import prediction
from mobilellm_jax.plan.compiled import CompiledStep, TooLarge
from mobilellm_jax.plan.fit import Fit
from mobilellm_jax.plan.hlo import Collective, Program

ROOT = Path(__file__).parent.parent.parent
CONFIG = "--config=configs/mobilellm_125m.py"
# This model is so small that the count takes little time.
SMALL = (
    "--config.model.num_blocks=2",
    "--config.data.seq_len=128",
    "--config.train.global_batch=64",
)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_paper_model_is_counted_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CONFIG, "--config.model.remat=full", "--config.mesh.fsdp=8"]) == 0
    out = capsys.readouterr().out
    assert "124,635,456 parameters, 30 blocks" in out
    assert "959,938,560 per token in sequences of 2048" in out
    assert "data 1, fsdp 8, tensor 1, sequence 1: 8 devices" in out
    assert "1024 x 2048 = 2,097,152 tokens a step; 128 sequences on a device at once" in out
    assert "weights 0.06 GiB, optimizer 0.12 GiB" in out
    assert "not compiled; --topology=v5e:16x16" in out


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (("--topology=v5e:4x4x4",), "a slice of v5e has 2 sides"),
        (("--config.mesh.data=3",), "must use all 8 devices"),
        (("--config.train.global_batch=12",), "train.global_batch=12 must be a multiple of"),
    ],
)
def test_impossible_plans_are_refused(
    flags: tuple[str, ...], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", CONFIG, *flags]) == 2
    assert rule in capsys.readouterr().err


def test_the_message_names_libtpu_if_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", CONFIG, "--topology=v5e:2x2"]) == 2
    assert 'pip install "mobilellm-jax[tpu]"' in capsys.readouterr().err


SENT = Collective(
    "all-reduce", "f32[10], f32[3]", 52_000_000, 4, 30, "jit(step)/blocks/attention/dot"
)
STEP = CompiledStep(
    2**30, 3 * 2**30, 2**31, Program((SENT,), 3 * 10**8, {"splash_mha_fwd": 2}, 1), 61.0
)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the TPU compiler and the search by given answers."""

    def answer(step: CompiledStep | TooLarge, fit: dict[str, Any] | None) -> None:
        import jax

        monkeypatch.setattr(planning, "topology_devices", lambda topology: jax.devices()[:4])
        monkeypatch.setattr(prediction, "peak_flops", lambda device: 197e12)
        monkeypatch.setattr(planning, "compile_step", lambda *_: step)
        monkeypatch.setattr(
            planning,
            "smallest_fit",
            lambda config, *_: fit and Fit(fit, changed(config, fit), STEP),
        )

    return answer


def test_a_step_that_fits(compiler: Any, capsys: pytest.CaptureFixture[str]) -> None:
    compiler(STEP, None)
    assert main(["plan", CONFIG, *SMALL, "--topology=v5e:2x2"]) == 0
    captured = capsys.readouterr()
    assert "compiling the step for v5e:2x2" in captured.err
    out = captured.out
    assert "2.00 GiB of 15.75 GiB at the peak; state 1.00 GiB, temporaries 3.00 GiB" in out
    assert "30 a step, 1,560.0 MB, of which a device sends 2,340.0 MB" in out
    assert "30 x all-reduce f32[10] and 1 more among 4: blocks/attention/dot" in out
    for kind in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        assert f"{kind:20}none\n" in out
    assert "1 loop of unknown length counted as one iteration" in out
    assert "libtpu's estimate for v5e: 300 M cycles without attention kernels" in out
    assert "Not measured." in out
    # 3e8 cycles take 199.6 ms at 1.503 GHz, and 2,340 MB take 11.7 ms at 200 GB/s.
    assert "199.6 ms to 211.3 ms a step (all communication hidden, or none)" in out
    assert "38,767 to 41,039 tokens/s, MFU 1% to 1%" in out


def test_a_step_that_does_not_fit(compiler: Any, capsys: pytest.CaptureFixture[str]) -> None:
    compiler(TooLarge(20 * 2**30, int(15.75 * 2**30), 9.0), {"model.remat": "dots"})
    assert main(["plan", CONFIG, *SMALL, "--topology=v5e:2x2"]) == 0
    out = capsys.readouterr().out
    assert "needs 20.00 GiB of the 15.75 GiB that a device has" in out
    assert "smallest change that fits: --config.model.remat=dots" in out
    assert out.index("remat none") < out.index("smallest change") < out.index("remat dots")
    compiler(TooLarge(20 * 2**30, int(15.75 * 2**30), 9.0), None)
    assert main(["plan", CONFIG, *SMALL, "--topology=v5e:2x2"]) == 1
    assert "take a larger slice" in capsys.readouterr().out
