"""What people do to a run while it trains; each time the run keeps its steps."""

import contextlib
import dataclasses
import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mobilellm_jax import announce, checkpoint, preflight, pretrain
from mobilellm_jax.cli.main import main
from mobilellm_jax.config import Config, EvaluateConfig, changed, to_json
from mobilellm_jax.data.mixture import open_mixture
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.model.on_device import settle
from mobilellm_jax.plan import memory
from mobilellm_jax.plan.accounting import account_of
from mobilellm_jax.plan.compiled import lower_step
from mobilellm_jax.processes import distributed
from mobilellm_jax.processes.run_lock import LOCK
from mobilellm_jax.startup import host_memory
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.train.metrics import MetricsWriter, read_metrics
from mobilellm_jax.train.report import Reporter
from mobilellm_jax.train.side_records import SideRecords
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
        key = config.train.steps, config.train.global_batch, config.optimizer.peak_lr
        if key not in _steps:
            _steps[key] = make(config, *arguments)
        return _steps[key]

    monkeypatch.setattr(pretrain, "make_train_step", made)


_steps: dict[Any, Any] = {}


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
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The suite may run under nohup.
    try:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert train(config, run) == 75
    finally:
        signal.signal(signal.SIGHUP, old)
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


@pytest.mark.parametrize(
    ("own", "others", "result"),
    [
        ("", ["", ""], ""),
        ("KeyError", ["KeyError: 'k'", ""], "training goes on"),
        ("", ["", "KeyError: 'k'"], "(DistributedError: in process 1: KeyError: 'k')"),
        ("KeyError", None, "raised"),  # The other process waits in a collective.
        ("JaxRuntimeError", [], "raised"),
    ],
)
def test_an_evaluation_of_two_processes_fails(
    own: str,
    others: list[str] | None,
    result: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def errors_of_all(what: str, error: str, timeout_sec: float = 0.0) -> list[str]:
        if others is None:
            raise distributed.DistributedError("no message from the other processes")
        return others

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "errors_of_all", errors_of_all)
    kinds = {"KeyError": KeyError, "JaxRuntimeError": jax.errors.JaxRuntimeError}
    expected = pytest.raises(kinds[own]) if result == "raised" else contextlib.nullcontext()
    with expected, SideRecords().attempt_together("the validation"):
        if own:
            raise kinds[own]("k")
    assert (result in caplog.text) if result != "raised" else not caplog.text


def test_the_texts_of_a_run_cannot_be_written(
    config: Config, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(config, {"evaluate.every": STEPS})
    monkeypatch.setattr(pretrain, "generate", lambda *_: [[{}]])
    assert train(config, run) == 0
    assert "FAILED writing samples.txt (" in capsys.readouterr().err
    (run / rundir.SAMPLES).write_text("somebody edited this\n")
    assert train(changed(config, {"train.steps": 8}), run) == 0
    assert "FAILED removing later samples from samples.txt (" in capsys.readouterr().err


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
        "e._FAREWELLS_SEC = 0.1; signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # not under nohup
        "s = e.EarlyStop(); s.__enter__();"
        "c = e.FAREWELLS.during(threading.Event().wait); c.__enter__();"
        "os.kill(os.getpid(), signal.SIGHUP); threading.Event().wait()"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 75


# The memory of a machine, and absurd lengths.


def test_somebody_trains_a_model_that_is_too_large_for_the_laptop(
    config: Config, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(config, {"train.global_batch": 64, "mesh.data": -1})
    settled = settle(config, jax.devices()[0])
    whole = account_of(settled, jax.devices()).total_bytes
    assert memory._generous_bytes(settled) > whole
    monkeypatch.setattr(memory, "memory_per_device", lambda _: int(0.6 * whole))
    assert train(config, run) == 2
    said = capsys.readouterr().err
    assert "The run does not fit into memory: a training step needs about" in said
    assert not (run / rundir.CONFIG).exists()
    # The remedy helps, also by the count of the compiler.
    (flag,) = re.findall(r"Add (--config\.\S+);", said)
    assert train(config, run, flag, "--config.train.steps=3") == 0
    name, _, value = flag.removeprefix("--config.").partition("=")
    small = lower_step(changed(settled, {name: int(value)}), jax.devices()).compile()
    analysis = small.memory_analysis()
    assert analysis is not None and analysis.peak_memory_in_bytes < 0.6 * whole
    file = run.parent / "config.py"
    assert main(["plan", f"--config={file}"]) == 0
    assert f"does not fit        a training step needs about {whole / 2**30:,.1f} GiB" in (
        capsys.readouterr().out
    )


def test_no_change_makes_a_model_fit(
    config: Config, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "memory_per_device", lambda _: 1000)
    assert train(config, run) == 2
    assert "take a smaller model" in capsys.readouterr().err
    assert main(["plan", f"--config={run.parent / 'config.py'}"]) == 1


def test_a_device_runs_out_of_memory_although_the_count_fits(
    config: Config, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    config = changed(config, {"train.global_batch": 64})
    monkeypatch.setattr(pretrain, "make_train_step", lambda *_: full)
    assert train(config, run) == 2
    said = capsys.readouterr().err
    assert "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes." in said
    assert "Add --config.train.accumulation_steps=" in said and "Traceback" not in said


def test_a_container_has_less_memory_than_its_machine(tmp_path: Path) -> None:
    (tmp_path / "groups").write_text("0::/box/inner\n")
    (tmp_path / "box" / "inner").mkdir(parents=True)
    (tmp_path / "box" / "memory.max").write_text("123456\n")
    (tmp_path / "box" / "inner" / "memory.max").write_text("max\n")
    assert list(host_memory._limits(tmp_path / "groups", tmp_path)) == [123456]
    (tmp_path / "groups").write_text("9:cpu,memory:/job\n")
    (tmp_path / "memory" / "job").mkdir(parents=True)
    (tmp_path / "memory" / "job" / "memory.limit_in_bytes").write_text("77\n")
    assert list(host_memory._limits(tmp_path / "groups", tmp_path)) == [77]


def test_somebody_takes_the_steps_of_the_paper_for_a_small_text(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    mixture = open_mixture(config.data.path)
    paper = changed(config, {"train.steps": 480_000, "optimizer.warmup_steps": 100_000})
    preflight.warn_of_epochs(paper, mixture)
    (said,) = caplog.messages
    flags = dict(re.findall(r"--config\.(\S+)=(\d+)", said))
    assert set(flags) == {"train.steps", "optimizer.warmup_steps"}
    preflight.warn_of_epochs(changed(paper, {n: int(v) for n, v in flags.items()}), mixture)
    assert caplog.messages == [said]


# Data without targets, and numbers that are none.


def test_somebody_masks_all_tokens(
    data: Path, config: Config, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`prepare` refuses such data, but an earlier version of it did not."""
    file, masked = run.parent / "calls.jsonl", run.parent / "masked"
    line = {"token_ids": list(range(10, 30)), "loss_mask": [1] * 20}
    file.write_text(json.dumps(line) + "\n")
    prepare([f"tokens:{file}"], masked, tokenizer=data / "tokenizer.model", validation_fraction=0)
    config = changed(config, {"data.path": str(masked), "data.verify": False})
    preflight.check(config, open_mixture(str(masked)))
    (mask,) = masked.glob("*.loss_mask")
    mask.write_bytes(bytes(mask.stat().st_size))
    assert train(config, run) == 2
    message = f"data.path={str(masked)!r}: no token of masked is a target"
    assert message in capsys.readouterr().err
    sweep = ["sweep", f"--config={run.parent / 'config.py'}", f"--workdir={run.parent / 'sweep'}"]
    assert main([*sweep, "--sweep=model.num_blocks=1,2", "--flops_per_sec=1e9"]) == 2
    assert message in capsys.readouterr().err


def test_somebody_sweeps_with_an_evaluation_that_cannot_run(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    flags = ["--sweep=model.num_blocks=1,2", "--flops_per_sec=1e9", "--config.evaluate.every=3"]
    command = ["sweep", f"--config={file}", f"--workdir={tmp_path / 'sweep'}", *flags]
    assert main([*command, "--config.evaluate.text=nothere.txt"]) == 2
    assert "evaluate.text=nothere.txt does not exist" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_batch_has_no_targets(
    config: Config, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = pretrain.train_batches

    def some_without(*args: Any, **flags: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches(*args, **flags)):
            weights = batch["weights"] * (number not in (2, 3))
            yield {**batch, "weights": weights}

    monkeypatch.setattr(pretrain, "train_batches", some_without)
    assert train(config, run) == 0
    assert recorded_steps(run) == [1, 2, 5, 6]
    said = capsys.readouterr().err
    assert said.count("NO TARGETS in step 3 (samples 16 to 23)") == said.count("NO TARGETS") == 1


def test_a_loss_that_is_no_number_is_json_for_other_programs(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, 10) as writer:
        writer.evaluation(1, {"validation/loss": math.nan, "validation/bpb": math.inf})
    (line,) = (tmp_path / rundir.METRICS).read_bytes().splitlines()
    assert strict_json.parse(line) == {"step": 1, "validation/loss": None, "validation/bpb": None}
    (record,) = read_metrics(tmp_path / rundir.METRICS)
    assert math.isnan(record["validation/loss"])
    # Files of earlier versions can still be read.
    (tmp_path / rundir.METRICS).write_text('{"step": 1, "validation/loss": NaN}\n')
    (record,) = read_metrics(tmp_path / rundir.METRICS)
    assert math.isnan(record["validation/loss"])


def test_somebody_starts_from_weights_with_nan(
    config: Config, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = jax.tree.map(lambda array: array + np.nan, tiny.random_params(config.model))
    damaged = run.parent / "damaged" / "run"
    checkpoint.save_model(damaged, config, params, load_tokenizer(Path(config.data.path)))
    assert train(config, run, f"--config.train.init_from={damaged}") == 2
    said = capsys.readouterr().err
    assert f"{damaged}" in said and "contains weights that are NaN or infinite: " in said
    assert "peak_lr" not in said


def test_the_first_step_is_not_finite_and_the_rate_is_not_blamed(config: Config) -> None:
    said = announce.divergence(config, Path("run"), range(1, 4), None)
    assert "train.init_from" in said and "lower optimizer.peak_lr" not in said
    assert "lower optimizer.peak_lr" in announce.divergence(config, Path("run"), range(4, 7), 2)


# Longer runs, and what the output says.


def test_somebody_extends_a_finished_run(
    config: Config, run: Path, at_step: AtStep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, run) == 0
    capsys.readouterr()
    assert train(config, run, "--config.optimizer.peak_lr=0.5") == 2
    assert "add --change_learning_rate" in capsys.readouterr().err
    at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(changed(config, {"train.steps": 10}), run) == 75
    said = capsys.readouterr().err
    assert "the learning rate changes from 0.001 to" in said and "(train.steps=6 to 10)" in said
    (rate,) = re.findall(r"--change_learning_rate --config\.optimizer\.peak_lr=(\S+)\.", said)
    flags = ["--change_learning_rate", f"--config.optimizer.peak_lr={rate}"]
    at_step(7, bool)
    assert train(changed(config, {"train.steps": 10}), run, *flags) == 0
    changes = (run / rundir.CHANGES).read_text().splitlines()
    assert json.loads(changes[0]) == {"step": 6, "train.steps": [6, 10]}
    assert json.loads(changes[1])["optimizer.peak_lr"] == [0.01, float(rate)]


def test_the_output_of_a_short_run(
    config: Config, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(changed(config, {"train.eval_every": 6}), run) == 0
    said = capsys.readouterr().err
    assert "0:00 left" not in said
    assert said.index("compiling the validation ...") < said.index("compiling the training step")
    assert said.index("compiling the training step ...") < said.index("step 1/6  loss")
    assert not (run / rundir.SAMPLES).exists()  # `docs/training.md` promises it for evaluate.every.
    (events,) = (run / rundir.TENSORBOARD).rglob("events*")
    assert events.parent.name == run.name
    content = events.read_bytes()
    for part in (b'"peak_lr": 0.01', b"_hparams_/session_start_info", b"optimizer.peak_lr"):
        assert part in content


def test_a_single_validation_is_no_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / rundir.METRICS).write_text('{"step": 0, "validation/loss": 1.977}\n')
    announce.end(tmp_path, True, {})
    assert "validation loss:          1.977 at step 0 (nats per token)" in caplog.text


def test_the_bar_of_a_terminal_moves_at_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    names = ("grad_norm", "learning_rate", "skipped", "skipped_steps", "bad_steps", "spike")
    metrics: Any = {**dict.fromkeys(names, 0.0), "loss": 1.0, "targets": 8.0}
    rare = changed(tiny.RUN, {"train.log_every": 50, "train.steps": 100})
    with MetricsWriter(tmp_path, 0, 100) as writer:
        report = Reporter(rare, writer)
        for step in range(1, 4):
            time.sleep(0.11)  # tqdm draws at most ten times a second.
            report.step(step, metrics)
            report.flush()
            assert f"{step}/100" in terminal.getvalue()


@pytest.mark.parametrize("columns", [0, 80])
def test_the_terminal_of_a_container_has_no_width(columns: int, tmp_path: Path) -> None:
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with standard_error_is(writer), MetricsWriter(tmp_path, 0, 100) as metrics:
        assert metrics._bar.disable == (columns == 0)  # Without a bar, the writer prints lines.
    os.close(reader)
