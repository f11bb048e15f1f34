import pytest

from mobilellm_jax.config import ConfigError
from mobilellm_jax.train.stopping import Walltime, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h50m", 13_800),
        ("90m", 5400),
        ("1d12h", 129_600),
        ("45s", 45),
        ("5400", 5400),
        ("2.5", 2.5),
        ("3:50:00", 13_800),  # a form of Slurm
        ("1-00:00:30", 86_430),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration("--max_walltime", text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "soon", "3h 50m", "50m3h", "-5", "1:2:3", "3:50"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_duration("--max_walltime", text)
    assert f"--max_walltime={text} must be a time" in str(error.value)
    assert "3h50m" in str(error.value)


def test_an_unknown_save_has_a_share_of_the_limit() -> None:
    now = [0.0]
    limit = Walltime(1000.0, now=lambda: now[0])
    limit.measured("step", 5.0)
    # The reserve is two steps, two saves of 100 s each, and a hundredth of the limit: 220 s.
    now[0] = 779.0
    assert not limit.is_up(look_is_near=True)
    now[0] = 780.0
    assert limit.is_up(look_is_near=False)
    assert limit.needs_a_save
    limit.measured("save", 1.0)
    assert not limit.needs_a_save
    assert not limit.is_up(look_is_near=False)
    limit.measured("look", 500.0)
    assert not limit.is_up(look_is_near=False)
    assert limit.is_up(look_is_near=True)


def test_without_a_limit_the_time_is_never_up() -> None:
    limit = Walltime(now=iter([0.0, 1e9]).__next__)
    assert not limit.needs_a_save
    assert not limit.is_up(look_is_near=True)


def test_one_slow_step_is_forgotten_in_time() -> None:
    limit = Walltime(1000.0, now=lambda: 500.0)
    assert not limit.is_up(look_is_near=False)
    limit = Walltime(1000.0, now=iter([0.0, *[500.0] * 9]).__next__)
    limit.measured("save", 1.0)
    limit.measured("step", 300.0)
    assert limit.is_up(look_is_near=False)
    for _ in range(16):
        limit.measured("step", 2.0)
    assert not limit.is_up(look_is_near=False)
