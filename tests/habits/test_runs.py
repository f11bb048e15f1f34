"""What people do to a run while it trains; each time the run keeps its steps."""

import contextlib
import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mobilellm_jax import checkpoint, pretrain
from mobilellm_jax.cli.main import main
from mobilellm_jax.config import Config, EvaluateConfig, to_json
from mobilellm_jax.processes.run_lock import LOCK
from mobilellm_jax.storage import rundir
from mobilellm_jax.train.metrics import MetricsWriter, read_metrics
from tests import tiny

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepared_words(tmp_path_factory.mktemp("words"))


@pytest.fixture
def config(data: Path) -> Config:
    """A run of six steps that saves only at its end, without evaluations."""
    return dataclasses.replace(
        tiny.RUN,
        data=dataclasses.replace(tiny.RUN.data, path=str(data)),
        train=dataclasses.replace(
            tiny.RUN.train, steps=STEPS, eval_every=0, checkpoint_every=1000, accumulation_steps=1
        ),
        evaluate=EvaluateConfig(),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Returns a function that makes something happen before the record of a step is written."""
    write = MetricsWriter.write

    def happen(step: int, action: Callable[[], object]) -> None:
        def write_after(self: MetricsWriter, number: int, values: Any) -> None:
            if number == step:
                action()
            write(self, number, values)

        monkeypatch.setattr(MetricsWriter, "write", write_after)

    return happen


AtStep = Callable[[int, Callable[[], object]], None]


@pytest.fixture(autouse=True)
def _compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests use one compiled step for each number of steps."""
    make = pretrain.make_train_step

    def made(config: Config, *arguments: Any) -> Any:
        key = config.train.steps
        if key not in _steps:
            _steps[key] = make(config, *arguments)
        return _steps[key]

    monkeypatch.setattr(pretrain, "make_train_step", made)


_steps: dict[int, Any] = {}


def train(config: Config, run: Path, *flags: str) -> int:
    """Runs the command of a user whose config file is `config`."""
    file = run.parent / "config.py"
    file.write_text(
        "from mobilellm_jax.config import from_json, to_config_dict\n\n"
        f"def get_config():\n    return to_config_dict(from_json({to_json(config)!r}))\n"
    )
    return main(["train", f"--config={file}", f"--workdir={run}", *flags])


def recorded_steps(run: Path) -> list[int]:
    return [r["step"] for r in read_metrics(run / rundir.METRICS) if "train/loss" in r]


@contextlib.contextmanager
def standard_error_is(descriptor: int) -> Iterator[None]:
    raw = open(descriptor, "wb", buffering=0, closefd=True)
    with pytest.MonkeyPatch.context() as patch, raw:
        patch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))
        yield


def pipe_without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    terminal, own = os.openpty()
    os.close(terminal)
    return own


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("output", [pipe_without_reader, closed_terminal, full_disk])
def test_somebody_pipes_the_output_into_head_or_closes_the_terminal(
    output: Callable[[], int], config: Config, run: Path
) -> None:
    with standard_error_is(output()):
        assert train(config, run) == 0
    assert checkpoint.latest_step(run) == STEPS
    lines = (run / rundir.MESSAGES).read_text().splitlines()
    assert lines[0].startswith("Standard error cannot be written (")
    assert any(line.startswith(f"step {STEPS}/{STEPS}  loss ") for line in lines)
    assert f"Finished: {run}" in lines


def test_somebody_closes_the_terminal_and_the_shell_sends_sighup(
    config: Config, run: Path, at_step: AtStep
) -> None:
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert train(config, run) == 75
    assert checkpoint.latest_step(run) in (3, 4)


def test_somebody_uses_nohup(config: Config, run: Path, at_step: AtStep) -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert train(config, run) == 0
    finally:
        signal.signal(signal.SIGHUP, old)


def test_somebody_starts_a_command_without_standard_streams() -> None:
    script = (
        "import os, sys; from mobilellm_jax.cli import main; sys.argv[1:] = ['--help'];"
        "code = main.run(); number = os.open('/dev/null', os.O_RDONLY);"
        "os._exit(code or number < 3 or sys.stdin.read() != '')"
    )
    command = f'exec "$0" -c "{script}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, sys.executable], check=False).returncode == 0


def test_somebody_deletes_the_tensorboard_folder(
    config: Config, run: Path, at_step: AtStep, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(3, lambda: shutil.rmtree(run / rundir.TENSORBOARD))
    assert train(config, run) == 0
    (events,) = (run / rundir.TENSORBOARD / run.name).iterdir()
    content = events.read_bytes()
    assert content.count(b"train/loss") == STEPS - 2 and b"brain.Event:2" in content
    assert f"{events} was deleted; later records go into a new file." in capsys.readouterr().err


def test_somebody_deletes_the_metrics(config: Config, run: Path, at_step: AtStep) -> None:
    at_step(3, lambda: (run / rundir.METRICS).unlink())
    assert train(config, run) == 0
    assert recorded_steps(run) == [3, 4, 5, 6]


def test_somebody_renames_the_run_folder(
    config: Config, run: Path, at_step: AtStep, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = run.with_name("renamed")
    at_step(3, lambda: run.rename(renamed))
    assert train(config, run) == 0
    assert checkpoint.latest_step(renamed) == STEPS
    assert recorded_steps(renamed) == [1, 2, 3, 4, 5, 6]
    assert (renamed / rundir.LOSS_PLOT).exists() and not (renamed / LOCK).exists()
    assert not run.exists()
    assert f"{run} is now {renamed}; the run goes on there." in capsys.readouterr().err


def test_somebody_renames_the_run_folder_and_starts_another_run_under_its_name(
    config: Config, run: Path, at_step: AtStep
) -> None:
    renamed = run.with_name("renamed")

    def rename_and_start_another() -> None:
        run.rename(renamed)
        run.mkdir()
        (run / LOCK).write_text('{"pid": 4711, "host": "here"}')

    at_step(3, rename_and_start_another)
    assert train(config, run) == 0
    assert checkpoint.latest_step(renamed) == STEPS
    assert [path.name for path in run.iterdir()] == [LOCK]


def test_somebody_deletes_the_run_folder(
    config: Config, run: Path, at_step: AtStep, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(3, lambda: shutil.rmtree(run))
    assert train(config, run) == 0
    assert f"{run} was deleted; the run creates it again and goes on." in capsys.readouterr().err
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=8))
    assert train(longer, run) == 0  # The new folder has all that a resumed run needs.
    assert checkpoint.latest_step(run) == 8


def test_somebody_deletes_the_lock(config: Config, run: Path, at_step: AtStep) -> None:
    at_step(3, lambda: (run / LOCK).unlink())
    assert train(config, run) == 0
    assert checkpoint.latest_step(run) == STEPS


def test_the_disk_is_full_for_a_while(
    config: Config, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small file system is full from step 3 on, and has room again from step 5 on."""
    run.mkdir()
    size = "size=4m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(run)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"the system allows no mount: {mounted.stderr.decode()}")
    filler, write = run / "filler", MetricsWriter.write

    def write_and_fill(self: MetricsWriter, step: int, values: Any) -> None:
        if step == 3:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
            (run / rundir.METRICS).write_bytes((run / rundir.METRICS).read_bytes() + b" " * 0)
        if step == 5:
            filler.unlink()
        write(self, step, {**values, "train/attention": "x" * 8192})

    monkeypatch.setattr(MetricsWriter, "write", write_and_fill)
    try:
        assert train(config, run) == 0
        assert recorded_steps(run) == [1, 2, 3, 4, 5, 6]
        assert checkpoint.latest_step(run) == STEPS
    finally:
        subprocess.run(["umount", str(run)], check=True)
    said = capsys.readouterr().err
    assert "FAILED writing metrics.jsonl (OSError: [Errno 28] No space left on device" in said
    assert "writing metrics.jsonl works again" in said
    assert "failed: writing metrics.jsonl (OSError" in said


def test_an_evaluation_fails_while_a_run_trains(
    config: Config, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("no such field")

    monkeypatch.setattr(pretrain._Run, "_validate", fail)
    monkeypatch.setattr(pretrain._Run, "_write_samples", fail)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, eval_every=3),
        evaluate=EvaluateConfig(every=6),
    )
    assert train(config, run) == 0
    assert checkpoint.latest_step(run) == STEPS
    said = capsys.readouterr().err
    assert "FAILED the validation at step 3 (KeyError: 'no such field'); training goes on." in said
    assert "failed: the samples and scores at step 6 (KeyError: 'no such field')" in said


def test_somebody_unplugs_the_disk_with_the_data(
    config: Config, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that ends a run does not cost the steps before it."""
    batches = pretrain.train_batches

    def failing(*args: Any, **flags: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches(*args, **flags)):
            if number == 4:
                raise OSError(5, "Input/output error")
            yield batch

    monkeypatch.setattr(pretrain, "train_batches", failing)
    with pytest.raises(OSError, match="Input/output"):
        train(config, run)
    assert checkpoint.latest_step(run) == 4


def test_somebody_trains_in_a_thread_of_a_notebook(config: Config, run: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(train(config, run)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_farewell_never_returns() -> None:
    script = (
        "import os, signal, threading; from mobilellm_jax.processes import early_stop as e;"
        "e._FAREWELLS_SEC = 0.1;"
        "s = e.EarlyStop(); s.__enter__();"
        "c = e.FAREWELLS.during(threading.Event().wait); c.__enter__();"
        "os.kill(os.getpid(), signal.SIGHUP); threading.Event().wait()"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 75
