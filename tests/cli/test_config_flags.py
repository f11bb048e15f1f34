from collections.abc import Callable
from pathlib import Path

import pytest

from mobilellm_jax.cli.config_flags import load_config, split_overrides
from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.config import Config, ConfigError

DEFAULTS = "from mobilellm_jax.config import to_config_dict as get_config\n"


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], str]:
    """Writes a config file and returns its path."""

    def write(source: str) -> str:
        file = tmp_path / "trial.py"
        file.write_text(source)
        return str(file)

    return write


@pytest.mark.parametrize(
    ("args", "overrides", "others"),
    [
        ([], [], []),
        (["--config=x.py", "--workdir=y"], [], ["--config=x.py", "--workdir=y"]),
        (["--config.a.b=1", "--workdir=y"], ["a.b=1"], ["--workdir=y"]),
        (["--workdir", "y", "--config.a.b", "1"], ["a.b=1"], ["--workdir", "y"]),
        (["-config.a.b=1"], ["a.b=1"], []),
        (["--config.a.b", "-1", "z"], ["a.b=-1"], ["z"]),
        (["--config.a.b=x=y"], ["a.b=x=y"], []),
        (["--config.a.b="], ["a.b="], []),
        (["--", "--config.a.b=1"], [], ["--", "--config.a.b=1"]),
        (["--configs.a=1"], [], ["--configs.a=1"]),
    ],
)
def test_split_overrides(args: list[str], overrides: list[str], others: list[str]) -> None:
    assert split_overrides(args) == (overrides, others)


@pytest.mark.parametrize("args", [["--config.a.b"], ["--config.a.b", "--workdir=y"]])
def test_override_without_a_value(args: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        split_overrides(args)
    assert str(caught.value) == "--config.a.b has no value; write --config.a.b=VALUE."


def test_file_without_overrides(written: Callable[[str], str]) -> None:
    assert load_config(written(DEFAULTS)) == Config()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=500_000", 500_000),
        ("mesh.data=-1", -1),
        ("optimizer.peak_lr=1e-3", 1e-3),
        ("optimizer.clip_norm=2", 2.0),
        ("model.tie_embeddings=false", False),
        ("model.tie_embeddings=True", True),
        ("model.tie_embeddings=0", False),
        ("model.sharing=reverse", "reverse"),
        ("data.path=a=b", "a=b"),
        ("train.init_from=", ""),
        ("data.path=1", "1"),
    ],
)
def test_override(override: str, value: object, written: Callable[[str], str]) -> None:
    group, field = override.partition("=")[0].split(".")
    result = getattr(getattr(load_config(written(DEFAULTS), [override]), group), field)
    assert (result, type(result)) == (value, type(value))


def test_last_override_wins(written: Callable[[str], str]) -> None:
    config = load_config(written(DEFAULTS), ["train.steps=2000", "train.steps=3000"])
    assert config.train.steps == 3000


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=1e3", "train.steps=1e3 must be a whole number. Write 1000."),
        ("train.steps=1.5", "train.steps=1.5 must be a whole number."),
        ("train.steps=many", "train.steps=many must be a whole number."),
        ("train.steps=", "train.steps= has no value; it must be a whole number."),
        ("optimizer.peak_lr=nan", "optimizer.peak_lr=nan must be a finite number."),
        ("optimizer.peak_lr=1e-3x", "optimizer.peak_lr=1e-3x must be a finite number."),
        ("model.tie_embeddings=yes", "model.tie_embeddings=yes must be true or false."),
        (
            "model.sharing=imediate",
            "model.sharing=imediate must be one of immediate, repeat_all, reverse. "
            "Did you mean immediate?",
        ),
        (
            "model.num_hedas=3",
            "model.num_hedas: unknown config key. Did you mean model.num_heads?",
        ),
        ("train=3", "train is a group of fields; set one, such as train.steps."),
        ("=3", ": unknown config key."),
    ],
)
def test_bad_override(override: str, expected: str, written: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(DEFAULTS), [override])
    assert str(caught.value) == expected


def test_all_bad_overrides_are_listed(written: Callable[[str], str]) -> None:
    bad = ["train.steps=x", "model.num_heads=8", "optimizer.eps=y", "nothing.at=all"]
    with pytest.raises(ConfigError) as caught:
        load_config(written(DEFAULTS), bad)
    fields = [line.split("=")[0].split(":")[0] for line in str(caught.value).splitlines()]
    assert fields == ["train.steps", "optimizer.eps", "nothing.at"]


def test_rules_hold_after_the_overrides(written: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match="model.num_heads=8 must be a multiple"):
        load_config(written(DEFAULTS), ["model.num_heads=8"])


def test_missing_file_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text(DEFAULTS)
    monkeypatch.chdir(tmp_path)
    for wrong, right in (("mien", "mine"), ("configs/quikstart.py", "quickstart")):
        with pytest.raises(FileNotFoundError) as caught:
            load_config(wrong)
        assert str(caught.value) == (
            f"--config={wrong} is not a file. Did you mean --config=configs/{right}.py?"
        )
        load_config(f"configs/{right}.py")


@pytest.mark.parametrize(
    ("source", "line", "expected"),
    [
        ("def get_config(:\n", 1, "SyntaxError: "),
        ("import no_such_module\n", 1, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return 1 / 0\n", 2, "ZeroDivisionError: division by zero"),
        (
            "from mobilellm_jax.config import to_config_dict\n"
            "def get_config():\n"
            "    config = to_config_dict()\n"
            "    config.model.num_hedas = 3\n"
            "    return config\n",
            4,
            'Did you mean "num_heads" instead of "num_hedas"?',
        ),
        (
            "from mobilellm_jax.config import to_config_dict\n"
            "config = to_config_dict()\n"
            "config.model.num_heads = 'nine'\n",
            3,
            "TypeError: ",
        ),
    ],
)
def test_file_that_fails(
    source: str, line: int, expected: str, written: Callable[[str], str]
) -> None:
    file = written(source)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("source", ["", "def get_config():\n    return {}\n", "get_config = 3\n"])
def test_file_without_a_config(source: str, written: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError):
        load_config(written(source))


def test_file_that_is_no_python(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("train: {steps: 3}\n  model: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    kinds = "--config must name a Python file (configs/NAME.py) or the config.json of a run."
    assert str(caught.value).endswith(kinds)
