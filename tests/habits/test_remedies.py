"""Users do what a message advises, and the same command then gets past its checks."""

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax import announce, preflight, pretrain
from mobilellm_jax.checkpoint import save_model
from mobilellm_jax.cli.main import main
from mobilellm_jax.config import Config, ConfigError, EvaluateConfig, changed, rules, to_json
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.storage import rundir
from tests import tiny

# A flag with a value that the user can copy. VALUE and ... stand for a choice of the user.
_FLAG = re.compile(r"--(?:config\.[\w.]+=[^\s,;']*[^\s,;'.]|change_learning_rate)")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepared_words(tmp_path_factory.mktemp("words"))


@pytest.fixture
def config(data: Path) -> Config:
    own = dataclasses.replace(tiny.RUN.data, path=str(data))
    return dataclasses.replace(tiny.RUN, data=own, evaluate=EvaluateConfig())


@pytest.fixture
def train(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any], list[str]], int]:
    """Returns a function that runs `train` in the folder `run`; it ends after the checks."""

    def only_check(config: Config, workdir: Path, *_: Any, change_learning_rate: bool) -> bool:
        preflight.take_workdir(workdir)
        preflight.settle_run(config, workdir, None, change_learning_rate=change_learning_rate)
        return True

    monkeypatch.setattr(pretrain, "pretrain", only_check)
    monkeypatch.chdir(tmp_path)

    def run(change: dict[str, Any], flags: list[str]) -> int:
        Path("config.json").write_text(to_json(config))
        changes = [f"--config.{name}={value}" for name, value in change.items()]
        given = [] if any(flag.startswith("--workdir") for flag in flags) else ["--workdir=run"]
        return main(["train", "--config=config.json", *changes, *given, *flags])

    return run


def advised(message: str) -> list[str]:
    """Returns the flags that a message advises."""
    other = ["--workdir=another"] if "another --workdir" in message else []
    return [*_FLAG.findall(message), *other]


def has_a_run(config: Config) -> None:
    """Makes the folder of a run that has taken eight steps of `config`."""
    step = changed(config, {"train.steps": 8, "model.compute_dtype": "float32"})
    data = load_tokenizer(Path(config.data.path))
    save_model("run", step, tiny.random_params(config.model), data)


def has_no_held_out_text(_: Config) -> None:
    Path("a.txt").write_text("thin deep block shared twice phone small model. " * 60)
    prepare(["text:a.txt"], Path("all"), vocab_size=300, validation_fraction=0)


@pytest.mark.parametrize(
    ("before", "change", "says"),
    [
        (None, {"model.vocab_size": 256}, "must be at least the vocabulary"),
        (has_no_held_out_text, {"data.path": "all"}, "needs a validation split with targets"),
        (has_a_run, {}, "holds a model without optimizer state"),
        (has_a_run, {"model.embed_dim": 32}, "holds a run with another config"),
        (has_a_run, {"optimizer.peak_lr": 0.5}, "holds a run with another config"),
    ],
)
def test_somebody_does_what_the_message_says(
    before: Callable[[Config], None] | None,
    change: dict[str, Any],
    says: str,
    config: Config,
    train: Callable[[dict[str, Any], list[str]], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if before is not None:
        before(config)
    flags: list[str] = []
    messages = []
    while train(change, flags) and len(messages) < 3:
        messages.append(capsys.readouterr().err)
        flags += [flag for flag in advised(messages[-1]) if flag not in flags]
    assert says in messages[0] and flags
    assert train(change, flags) == 0


def test_somebody_copies_the_commands_at_the_end_of_a_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    has_a_run(config)
    (tmp_path / "run" / rundir.METRICS).touch()
    caplog.set_level("INFO")
    announce.end(Path("run"), True, {})
    commands = re.findall(r"mobilellm (.*)", caplog.text)
    assert len(commands) == 2
    for command in commands:
        assert main([*shlex.split(command), *["--max_new_tokens=2"][: "generate" in command]]) == 0


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"model.num_heads": 6, "model.num_kv_heads": 4}, ("model.num_kv_heads", "from (.*)")),
        ({"model.head_dim": 7}, ("model.head_dim", r"choose (\d+) or (\d+)")),
        (
            {"model.attention": "cudnn", "model.head_dim": 12},
            ("model.attention", r"12 must be .*choose (\w+) or (\w+)"),
        ),
        ({"model.attention": "splash"}, ("model.attention", r"choose (\w+) or (\w+), or other")),
        (
            {"model.attention": "cudnn", "data.boundaries": "document_mask"},
            ("model.attention", "documents apart, .*choose (.*) or (auto)"),
        ),
        (
            {"model.attention": "cudnn", "data.boundaries": "document_mask"},
            ("data.boundaries", r"--config.data.boundaries=(\w+)"),
        ),
        (
            {"model.attention": "cudnn", "model.compute_dtype": "float32"},
            ("model.compute_dtype", r"--config.model.compute_dtype=(\w+)"),
        ),
        (
            {"model.attention": "tokamax", "mesh.sequence": 2},
            ("model.attention", "over devices, .*choose (.*) or (auto)"),
        ),
        (
            {"model.attention": "tokamax", "mesh.sequence": 2},
            ("mesh.sequence", r"--config.mesh.sequence=(\d+)"),
        ),
        ({"model.rope_factor": 2.0}, ("model.rope_scaling", "set it to (.*) or (.*)\\.")),
        ({"evaluate.tasks": "piqa"}, ("evaluate.every", "a (number) of steps")),
    ],
)
def test_somebody_takes_a_value_that_a_rule_offers(
    change: dict[str, Any], advice: tuple[str, str], config: Config
) -> None:
    """The value ends this complaint; another rule may still complain about another setting."""
    field, pattern = advice

    def complaints(more: dict[str, Any]) -> str:
        try:
            changed_config = changed(config, {**change, **more})
        except ConfigError as error:
            return str(error)
        return "\n".join(rules.attention_violations(changed_config, changed_config.model.attention))

    found = re.search(pattern, complaints({}))
    assert found is not None, complaints({})
    offered = ", ".join(group for group in found.groups() if group).strip(".").split(", ")
    for text in offered:
        value: Any = int(text) if text.isdecimal() else 4 if text == "number" else text
        assert re.search(pattern, complaints({field: value})) is None
