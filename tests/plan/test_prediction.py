import dataclasses

import jax
import pytest

from mobilellm_jax.config import Config, DataConfig, ModelConfig
from mobilellm_jax.plan import prediction
from mobilellm_jax.plan.accounting import Account
from mobilellm_jax.plan.compiled import CompiledStep
from mobilellm_jax.plan.hlo import Collective, Program
from mobilellm_jax.plan.prediction import predict
from mobilellm_jax.plan.topology import Chip

CHIP = Chip(
    "test", 16 * 2**30, 1e9, 1e8, flops_per_cycle=1000, matrix_unit=128, dimensions=2, most_chips=4
)
PEAK = 2e12
CONFIG = Config(
    model=ModelConfig(num_heads=4, num_kv_heads=2, head_dim=64), data=DataConfig(seq_len=2048)
)
ACCOUNT = Account(
    parameters=0,
    flops_per_token=1000,
    tokens_per_step=10**9,
    num_devices=4,
    rows=3,
    weight_bytes=0,
    optimizer_bytes=0,
    gradient_bytes=0,
    activation_bytes=0,
    loss_bytes=0,
)
SENT = Collective("all-reduce", "f32[1]", payload_bytes=10**6, group=4, times=10, origin="")
KERNELS = {"splash_mha_fwd_residuals": 30, "splash_mha_dkv_x": 30, "splash_mha_dq_x": 30}
STEP = CompiledStep(1, 1, 3 * 10**7, Program((SENT,), 10**9, KERNELS, 0), 1.0)

DEVICES = jax.devices()[:1]


@pytest.fixture(autouse=True)
def _count_and_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "account_of", lambda *_: ACCOUNT)
    monkeypatch.setattr(prediction, "peak_flops", lambda device: PEAK)


def test_bounds_and_estimate_by_hand() -> None:
    found = predict(CONFIG, STEP, CHIP, DEVICES)
    assert found.flops_sec == 1000 * 10**9 / 4 / PEAK
    assert found.memory_sec == 2 * 3e7 / 1e9
    assert found.network_sec == pytest.approx(10 * 2 * 10**6 * 3 / 4 / 1e8)
    assert found.estimated_sec == 10**9 / (PEAK / 1000)
    # 30 layers have 9 products with 2 FLOPs each. Of 16 blocks, 10 are computed. Heads fill half a
    # unit.
    products = 9 * 30 * 2 * 3 * 4 * 64 * 2048**2 * 10 / 16
    assert found.kernels_sec == pytest.approx(products / (PEAK / 2))
    assert found.roofline_sec == max(found.flops_sec, found.memory_sec, found.network_sec)
    assert found.fastest_sec == pytest.approx(0.5 + found.kernels_sec)
    assert found.slowest_sec == pytest.approx(0.5 + found.kernels_sec + found.network_sec)


def test_heads_of_the_units_width_fill_it() -> None:
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, head_dim=128))
    narrow_sec = predict(CONFIG, STEP, CHIP, DEVICES).kernels_sec
    assert predict(wide, STEP, CHIP, DEVICES).kernels_sec == pytest.approx(narrow_sec)


def test_no_estimate_leaves_the_roofline() -> None:
    program = Program((SENT,), None, {}, 0)
    found = predict(CONFIG, dataclasses.replace(STEP, program=program), CHIP, DEVICES)
    assert found.estimated_sec is None
    assert found.fastest_sec == found.slowest_sec == found.roofline_sec
