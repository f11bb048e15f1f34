import ast
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mobilellm_jax.cli import main as cli
from mobilellm_jax.cli import train
from mobilellm_jax.config import ConfigError

CONFIG = "--config=configs/quickstart.py"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def train_with(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[train.Flags, list[str]], object]], None]:
    """Replaces the work of `mobilellm train`, but not its flags."""
    return lambda function: monkeypatch.setattr(train, "main", function)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_overview_lists_the_commands(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    for name, line in cli.COMMANDS.items():
        assert f"  {name} " in out and line in out


def test_overview_imports_no_command() -> None:
    script = (
        "import sys; from mobilellm_jax.cli.main import main; main([]);"
        "print([m for m in sys.modules if m.startswith('mobilellm_jax.cli.') or m == 'jax'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = ast.literal_eval(result.stdout.splitlines()[-1])
    names = ("config_files", "config_flags", "errors", "flags", "main")
    expected = {f"mobilellm_jax.cli.{name}" for name in names}
    assert set(loaded) == expected


def test_help_shows_examples_and_only_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--workdir=x", "--help"]) == 0
    out = capsys.readouterr().out
    assert "mobilellm train --config=configs/quickstart.py" in out
    switches = [line.split("=")[0].strip() for line in out.splitlines() if line.startswith("  --")]
    assert {"--config", "--config.GROUP.FIELD", "--workdir"} <= set(switches)
    # These flags belong to other commands, or to absl.
    assert {"--checkpoint", "--source", "--data", "--verbosity", "--flagfile"}.isdisjoint(switches)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["trian"], "mobilellm trian: unknown command trian. Did you mean train?"),
        (["--workdir=x"], "unknown flag before the command --workdir=x."),
        (
            ["train", CONFIG, "--workdri=x"],
            "mobilellm train: unknown flag --workdri. Did you mean --workdir?",
        ),
        (["train", CONFIG, "--workdir=x", "stray"], "stray argument 'stray'"),
        (["train", CONFIG], "--workdir is missing: run folder"),
        (["train", CONFIG, "--workdir=x", "--config.train.steps"], "has no value"),
        (
            ["train", CONFIG, "--workdir=x", "--config.trian.steps=3"],
            "trian.steps: unknown config key. Did you mean train.steps?",
        ),
        (
            ["train", "--config=configs/quikstart.py", "--workdir=x"],
            "Did you mean --config=configs/quickstart.py?",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_command_line(
    args: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""


def test_all_missing_flags_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train"]) == 2
    err = capsys.readouterr().err
    assert "--config is missing" in err and "--workdir is missing" in err


def test_overrides_reach_the_command(train_with: Callable[..., None]) -> None:
    received: list[tuple[train.Flags, list[str]]] = []
    train_with(lambda *arguments: received.append(arguments))
    overrides = ["--config.train.steps=5", "--config.mesh.data", "-1"]
    assert cli.main(["train", CONFIG, *overrides, "--workdir=x"]) == 0
    [(flags, given)] = received
    assert given == ["train.steps=5", "mesh.data=-1"]
    assert (flags.config, flags.workdir, flags.process_id) == (
        "configs/quickstart.py",
        Path("x"),
        None,
    )


def test_overrides_are_refused_without_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--config.train.steps=5"]) == 2
    assert "unknown flag --config.train.steps; report takes no config." in capsys.readouterr().err


def test_flags_start_from_their_defaults_each_time(train_with: Callable[..., None]) -> None:
    train_with(lambda flags, overrides: None)
    assert cli.main(["train", CONFIG, "--workdir=x"]) == 0
    assert cli.main(["train", CONFIG]) == 2


def test_two_commands_may_have_a_flag_of_the_same_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command, own in (("evaluate", "--perplexity"), ("generate", "--top_k")):
        assert cli.main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert "  --checkpoint\n" in out and f"  {own}\n" in out


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75)])
def test_exit_code_of_a_command(
    returned: int | None, code: int, train_with: Callable[..., None]
) -> None:
    train_with(lambda flags, overrides: returned)
    assert cli.main(["train", CONFIG, "--workdir=x"]) == code


def test_interrupted(train_with: Callable[..., None]) -> None:
    def interrupt(flags: train.Flags, overrides: list[str]) -> None:
        raise KeyboardInterrupt

    train_with(interrupt)
    assert cli.main(["train", CONFIG, "--workdir=x"]) == 130


def test_bad_input_is_one_message(
    train_with: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(flags: train.Flags, overrides: list[str]) -> None:
        raise ConfigError("train.steps=0 must be at least 1.")

    train_with(refuse)
    assert cli.main(["train", CONFIG, "--workdir=x"]) == 2
    assert capsys.readouterr().err == "mobilellm train: train.steps=0 must be at least 1.\n"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("a bug")])
def test_a_failure_while_running_is_raised(
    error: Exception, train_with: Callable[..., None]
) -> None:
    def fail(flags: train.Flags, overrides: list[str]) -> None:
        raise error

    train_with(fail)
    with pytest.raises(type(error), match=str(error)):
        cli.main(["train", CONFIG, "--workdir=x"])


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (["--help"], 0, ""),
        (["train", "--config=none.py", "--workdir=x"], 2, "mobilellm train: --config=none.py"),
    ],
)
def test_exit_code_of_the_process(args: list[str], code: int, expected: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mobilellm_jax", *args], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == code
    assert result.stderr.startswith(expected)
    assert "Traceback" not in result.stderr


def run_without_reader(
    script: str, tmp_path: Path, *, stderr_too: bool = False, unbuffered: str = ""
) -> tuple[int, str]:
    """Runs a Python script with its standard output in a pipe that has no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    errors = (tmp_path / "errors").open("w+")
    with os.fdopen(writer, "w") as out, errors:
        process = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=out,
            stderr=out if stderr_too else errors,
            check=False,
        )
        errors.seek(0)
        return process.returncode, errors.read()


@pytest.mark.parametrize("stderr_too", [False, True])
@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["train"]])
def test_nobody_reads_the_output(args: list[str], stderr_too: bool, tmp_path: Path) -> None:
    script = f"import sys; from mobilellm_jax.cli.main import run; sys.argv[1:] = {args}; "
    code, errors = run_without_reader(script + "sys.exit(run())", tmp_path, stderr_too=stderr_too)
    if args == ["train"] and not stderr_too:  # the message goes to standard error
        assert (code, "--workdir is missing" in errors) == (2, True)
    else:
        assert (code, errors) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_does_not_fit_the_buffer(unbuffered: str, tmp_path: Path) -> None:
    """The pipe breaks in the middle of the command, not at its end."""
    script = (
        "import sys; from mobilellm_jax.cli import main;"
        "main._overview = lambda: 'x' * 1_000_000;"
        "sys.argv[1:] = ['--help']; sys.exit(main.run())"
    )
    assert run_without_reader(script, tmp_path, unbuffered=unbuffered) == (141, "")


def test_output_that_is_closed() -> None:
    command = f"exec >&-; exec {sys.executable} -m mobilellm_jax --help"
    result = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_another_broken_pipe_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        one, other = socket.socketpair()
        other.close()
        with one:
            one.sendall(b"x")
        raise AssertionError("unreachable")

    monkeypatch.setattr(cli, "_overview", fail)
    monkeypatch.setattr(sys, "argv", ["mobilellm", "--help"])
    with pytest.raises(BrokenPipeError):
        cli.run()
