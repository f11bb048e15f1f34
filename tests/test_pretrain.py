"""Trains a run from the command line to its checkpoint, and resumes, extends and refuses runs."""

import dataclasses
import json
import logging
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mobilellm_jax import checkpoint, preflight, pretrain
from mobilellm_jax.cli.main import main
from mobilellm_jax.config import Config, ConfigError, QuantizeConfig, from_json
from mobilellm_jax.data.mixture import open_mixture
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.evaluate.engine import jax_engine
from mobilellm_jax.evaluate.perplexity import CutText, perplexity
from mobilellm_jax.open_model import open_model
from mobilellm_jax.train.metrics import MetricsWriter
from tests import lives, tiny

STEPS = 16
CONFIG = f"""
from mobilellm_jax.config import to_config_dict

def get_config():
    config = to_config_dict()
    config.model.update(vocab_size=300, embed_dim=16, num_blocks=2, num_repeats=2, num_heads=2,
                        num_kv_heads=1, head_dim=8, ffn_dim=24, max_seq_len=64)
    config.data.update(path=DATA, seq_len=16)
    config.optimizer.update(peak_lr=1e-2, warmup_steps=2)
    config.train.update(steps={STEPS}, global_batch=8, log_every=1, eval_every=8, eval_batches=2,
                        checkpoint_every=3, keep_checkpoints=3)
    config.evaluate.update(every=8, samples=1)
    return config
"""


# Runs that need neither validation nor samples do not trace and compile them.
TRAINING_ALONE = ("--config.train.eval_every=0", "--config.evaluate.every=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepared_words(tmp_path_factory.mktemp("text"))


@pytest.fixture
def config_file(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(f"DATA = {str(data)!r}\n{CONFIG}")
    return path


def command(config_file: Path, workdir: Path, *overrides: str) -> list[str]:
    return ["train", f"--config={config_file}", f"--workdir={workdir}", *overrides]


def run(config_file: Path, workdir: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    return lives.run(command(config_file, workdir, *overrides), workdir.with_suffix(".log"))


def losses(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["train/loss"] for r in map(json.loads, lines) if "train/loss" in r}


def validations(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["validation/bpb"] for r in map(json.loads, lines) if "validation/bpb" in r}


def stored(workdir: Path, step: int) -> dict[str, Any]:
    """Returns the content of a step, read by Orbax: parameters, optimizer, step and key."""
    folder = workdir / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as reader:
        return {name: reader.restore(folder / name) for name in ("params", "optimizer")}


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = folder / "config.py"
    config.write_text(f"DATA = {str(data)!r}\n{CONFIG}")
    result = run(config, folder / "run")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_run_folder_is_complete(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {
        *("config.json", "tokenizer.model", "checkpoints", "metrics.jsonl", "tensorboard"),
        *("loss.png", "samples.txt"),
    }
    assert checkpoint.steps(uninterrupted) == [12, 15, 16]
    assert sorted(losses(uninterrupted)) == list(range(1, STEPS + 1))
    assert sorted(validations(uninterrupted)) == [0, 8, 16]
    assert from_json((uninterrupted / "config.json").read_text()).model.compute_dtype == "float32"
    lines = (uninterrupted / "samples.txt").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["step"] for s in samples] == [8, 16]
    assert all(isinstance(s["text"], str) for s in samples)


def test_it_learns(uninterrupted: Path) -> None:
    assert validations(uninterrupted)[16] < validations(uninterrupted)[0] - 0.5


@pytest.mark.parametrize("after_step", [pytest.param(2, marks=pytest.mark.soak), 10])
def test_killed_run_goes_on_as_if_nothing_had_happened(
    config_file: Path, tmp_path: Path, uninterrupted: Path, after_step: int
) -> None:
    workdir = tmp_path / "run"
    process = lives.start(command(config_file, workdir), tmp_path / "killed.log")
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and max(losses(workdir), default=0) >= after_step):
        assert process.exitcode is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert (checkpoint.latest_step(workdir) or 0) < STEPS

    result = run(config_file, workdir)
    assert result.returncode == 0, result.stderr
    assert losses(workdir) == losses(uninterrupted)
    assert validations(workdir) == validations(uninterrupted)
    assert (workdir / "samples.txt").read_text() == (uninterrupted / "samples.txt").read_text()
    assert_same_bits(stored(workdir, STEPS), stored(uninterrupted, STEPS))


def test_stopped_run_saves_and_asks_to_be_started_again(
    config_file: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    workdir = tmp_path / "run"
    flags = command(config_file, workdir, "--config.train.checkpoint_every=1000")
    process = lives.start(flags, tmp_path / "stopped.log")
    while not ((workdir / "metrics.jsonl").exists() and losses(workdir)):
        assert process.exitcode is None
        time.sleep(0.005)
    process.terminate()
    process.join()
    assert process.exitcode == 75, (tmp_path / "stopped.log").read_text()
    step = checkpoint.latest_step(workdir)
    assert step is not None
    assert 1 <= step < STEPS
    assert run(config_file, workdir).returncode == 0
    assert losses(workdir) == losses(uninterrupted)


def test_evaluation_lost_after_the_last_save_is_made_again(
    config_file: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "validation/bpb" in lines[-1]
    (workdir / "metrics.jsonl").write_text("".join(lines[:-1]))
    (workdir / "samples.txt").write_text("")
    result = run(config_file, workdir)
    assert result.returncode == 0, result.stderr
    assert losses(workdir) == losses(uninterrupted)
    assert validations(workdir) == validations(uninterrupted)
    last = (uninterrupted / "samples.txt").read_text().splitlines()[-1]
    assert (workdir / "samples.txt").read_text().splitlines() == [last]


def test_nothing_compiles_once_everything_has_happened(
    uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps, evaluations, checkpoints and samples each compile when they first occur."""
    base = from_json((uninterrupted / "config.json").read_text())
    train = dataclasses.replace(base.train, eval_every=2, checkpoint_every=2, steps=8)
    evaluate = dataclasses.replace(base.evaluate, every=2)
    config = dataclasses.replace(base, train=train, evaluate=evaluate)
    compiled: dict[int, list[str]] = {}
    write = MetricsWriter.write

    def write_and_look(self: MetricsWriter, step: int, values: Any) -> None:
        messages = [record.getMessage() for record in caplog.records]
        compiled[step] = [m for m in messages if "Compiling jit(" in m]
        write(self, step, values)

    with pytest.MonkeyPatch.context() as patch, jax.log_compiles():
        patch.setattr(MetricsWriter, "write", write_and_look)
        with caplog.at_level(logging.WARNING, "jax"):
            assert pretrain.pretrain(config, tmp_path / "run")
        last = [r.getMessage() for r in caplog.records if "Compiling jit(" in r.getMessage()]
    assert sum("jit(step)" in message for message in last) == 1
    assert sum("jit(loss_sums)" in message for message in last) == 1
    assert compiled[3] == last[: len(compiled[3])]
    assert last[len(compiled[3]) :] == []


def test_a_text_is_measured_after_saving_and_again_if_that_was_lost(
    uninterrupted: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, workdir = data.parent / "0.txt", tmp_path / "run"
    base = from_json((uninterrupted / "config.json").read_text())
    train = dataclasses.replace(base.train, eval_every=0, checkpoint_every=2, steps=4)
    evaluate = dataclasses.replace(base.evaluate, every=2, text=str(file))
    config = dataclasses.replace(base, train=train, evaluate=evaluate)
    events: list[str] = []
    save, write = checkpoint.CheckpointWriter.save, MetricsWriter.write

    def save_and_tell(self: Any, step: int, *args: Any) -> None:
        save(self, step, *args)
        events.append(f"saved {step}")

    def write_and_tell(self: Any, step: int, values: Any) -> None:
        write(self, step, values)
        events.extend([f"measured {step}"] if "evaluate/text/loss" in values else [])

    monkeypatch.setattr(checkpoint.CheckpointWriter, "save", save_and_tell)
    monkeypatch.setattr(MetricsWriter, "write", write_and_tell)
    assert pretrain.pretrain(config, workdir)
    assert events == ["saved 2", "measured 2", "saved 4", "measured 4"]
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = json.loads(lines[-1])
    model = open_model(workdir)
    engine = jax_engine(model.config, model.params, jax.devices()[:1])
    expected = perplexity(engine, CutText.cut(model.tokenizer, file.read_text(), 64, stride=64))
    # The run used eight devices, and `expected` used one device.
    assert last["evaluate/text/loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert last["evaluate/text/bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    board = workdir / "tensorboard" / workdir.name
    assert any(b"evaluate/text/loss" in path.read_bytes() for path in board.iterdir())

    (workdir / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert pretrain.pretrain(config, workdir)
    assert (workdir / "metrics.jsonl").read_text() == "".join(lines)


def test_profile_of_chosen_steps(config_file: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    flags = [*TRAINING_ALONE, "--config.train.steps=4", "--profile_steps=2:3"]
    result = run(config_file, workdir, *flags)
    assert result.returncode == 0, result.stderr
    assert list((workdir / "profile" / "plugins" / "profile").glob("*/*.xplane.pb"))
    assert (workdir / "profile" / "memory-step-3.prof").stat().st_size


def test_finished_run_is_extended_by_more_steps(config_file: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    four = [*TRAINING_ALONE, "--config.train.steps=4"]
    assert run(config_file, workdir, *four).returncode == 0
    again = run(config_file, workdir, *four)
    assert again.returncode == 0, again.stderr
    assert "boundaries concat: attention crosses document borders" in again.stderr
    assert checkpoint.latest_step(workdir) == 4
    assert run(config_file, workdir, *TRAINING_ALONE, "--config.train.steps=6").returncode == 0
    assert sorted(losses(workdir)) == [1, 2, 3, 4, 5, 6]


def test_start_from_another_runs_parameters(
    data: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    base = from_json((uninterrupted / "config.json").read_text())
    train = dataclasses.replace(
        base.train, init_from=str(uninterrupted), steps=3, eval_every=3, checkpoint_every=3
    )
    config = dataclasses.replace(base, train=train)
    assert pretrain.pretrain(config, tmp_path / "run")
    # The first update is zero, so the first validation measures the given parameters.
    expected = validations(uninterrupted)[16]
    assert validations(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-5)


def test_quantized_training_goes_on_exactly_and_says_what_it_is(
    data: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    base = from_json((uninterrupted / "config.json").read_text())
    train = dataclasses.replace(
        base.train, init_from=str(uninterrupted), steps=6, eval_every=6, checkpoint_every=3
    )
    optimizer = dataclasses.replace(base.optimizer, schedule="constant")
    quantize = QuantizeConfig(scheme="w4a8")
    evaluate = dataclasses.replace(base.evaluate, every=0)
    config = dataclasses.replace(
        base, train=train, optimizer=optimizer, quantize=quantize, evaluate=evaluate
    )
    assert pretrain.pretrain(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert pretrain.pretrain(config, tmp_path / "run")  # from step 3
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_bits(stored(tmp_path / "run", 6), stored(tmp_path / "whole", 6))
    # The floats are stored, but validation uses the integers that the floats stand for.
    opened = open_model(tmp_path / "run")
    assert opened.run_config is not None
    assert opened.run_config.quantize == quantize
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(opened.params))
    assert validations(tmp_path / "whole")[0] != pytest.approx(
        validations(uninterrupted)[16], rel=1e-5
    )
    with pytest.raises(ConfigError, match=r"quantize.scheme: 'w4a8' there, 'none' here"):
        pretrain.pretrain(dataclasses.replace(config, quantize=QuantizeConfig()), tmp_path / "run")


def test_mixture_goes_on_exactly_and_is_told_apart(
    config_file: Path, data: Path, tmp_path: Path
) -> None:
    """Trains on two components, one with a loss mask, with document borders. Resumes at step 3."""
    rng = np.random.default_rng(1)
    with (tmp_path / "calls.jsonl").open("w") as file:
        for _ in range(60):
            mask = rng.integers(0, 2, 9).tolist()
            line = {"token_ids": rng.integers(10, 290, 9).tolist(), "loss_mask": mask}
            file.write(json.dumps(line) + "\n")
    tokenizer = data / "tokenizer.model"
    prepare([f"tokens:{tmp_path}/calls.jsonl"], tmp_path / "calls", tokenizer=tokenizer,
            validation_fraction=0.2)  # fmt: skip
    path = f"{data}:0.75,{tmp_path}/calls:0.25"
    flags = [f"--config.data.path={path}", "--config.data.boundaries=document_mask"]
    flags += ["--config.train.steps=6", "--config.train.eval_every=3"]
    whole = tmp_path / "whole"
    result = run(config_file, whole, *flags)
    assert result.returncode == 0, result.stderr
    assert "boundaries document_mask: attention and positions stay within" in result.stderr
    assert "documents of tokens, 75.00% of the samples" in result.stderr
    assert "documents of calls, 25.00% of the samples" in result.stderr
    assert "a loss mask on them" in result.stderr
    fingerprint = open_mixture(path).fingerprint
    for step in (3, 6):
        expected = checkpoint.DataState(next_sample=8 * step, fingerprint=fingerprint)
        assert checkpoint.read_data_state(whole, step) == expected
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    keys = [{k for k in r if k.startswith("validation/")} for r in records if r["step"] == 6]
    names = {"validation/loss", "validation/loss/tokens", "validation/loss/calls"}
    assert keys == [set(), names]

    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "6")
    result = run(config_file, resumed, *flags)
    assert result.returncode == 0, result.stderr
    assert "resume  from step 3" in result.stderr
    assert losses(resumed) == losses(whole)
    assert checkpoint.read_data_state(resumed, 6) == checkpoint.read_data_state(whole, 6)
    assert_same_bits(stored(resumed, 6), stored(whole, 6))


BAD_RUNS = {
    "unknown key": (["--config.model.num_head=2"], ["model.num_head", "model.num_heads"]),
    "wrong type": (["--config.train.steps=many"], ["train.steps=many", "whole number"]),
    "heads": (
        ["--config.model.num_heads=3", "--config.model.num_kv_heads=2"],
        ["model.num_heads=3", "model.num_kv_heads=2", "multiple", "choose"],
    ),
    "batch and devices": (
        ["--config.train.global_batch=12"],
        ["train.global_batch=12", "multiple of 8", "(8)"],
    ),
    "batch and accumulation": (
        ["--config.train.accumulation_steps=2"],
        ["train.global_batch=8", "train.accumulation_steps (2)", "multiple of 16"],
    ),
    "mesh": (["--config.mesh.data=3"], ["mesh.data=3", "8 devices", "-1"]),
    "vocabulary": (
        ["--config.model.vocab_size=256"],
        ["model.vocab_size=256", "300", "--config.model.vocab_size=300"],
    ),
    "no data": (["--config.data.path=/nowhere"], ["/nowhere", "does not exist", "prepare"]),
    "no such source": (
        ["--config.data.path=new", "--config.data.source=python_doc"],
        ["python_doc", "python_docs"],
    ),
    "workdir": (["--workdir=/dev/null/run"], ["/dev/null/run", "cannot be written", "--workdir"]),
    "warm-up": (
        ["--config.optimizer.warmup_steps=99"],
        ["optimizer.warmup_steps=99", "train.steps=16"],
    ),
    "no range of steps": (["--profile_steps=3-5"], ["--profile_steps=3-5", "10:12"]),
    "steps not taken": (["--profile_steps=15:17"], ["--profile_steps=15:17", "1 to 16"]),
    "one flag of three": (["--process_id=1"], ["--process_id=1", "--coordinator_address"]),
    "start": (["--config.train.init_from=/nowhere"], ["/nowhere"]),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_input_ends_with_one_message_before_any_compile(
    case: str,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def compiled(*_: object, **__: object) -> None:
        raise AssertionError("computing began")

    # The count of the memory traces the model with `jax.jit`, and compiles nothing.
    monkeypatch.setattr(preflight, "shortage", lambda *_: None)
    monkeypatch.setattr(jax, "jit", compiled)
    monkeypatch.setattr(pretrain, "abstract_state", compiled)
    monkeypatch.chdir(tmp_path)
    flags, expected = BAD_RUNS[case]
    arguments = ["train", f"--config={config_file}", "--workdir=run", *flags]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in expected:
        assert part in message
    assert not (tmp_path / "run" / "config.json").exists()


def test_missing_tokenizer_is_named(
    config_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = data / "tokenizer.model"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    try:
        assert main(["train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]) == 2
    finally:
        tokenizer.write_bytes(content)
    message = capsys.readouterr().err
    assert str(tokenizer) in message
    assert "Traceback" not in message


@pytest.mark.parametrize("content", ["", None])
def test_empty_corpus_is_named(
    content: str | None,
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / "empty.txt").write_text(content)
    flags = [
        f"--config.data.path={tmp_path / 'new'}",
        f"--config.data.source=text:{tmp_path}/*.txt",
    ]
    arguments = ["train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *flags]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert str(tmp_path) in message
    assert "Traceback" not in message
    assert not (tmp_path / "new").exists()


def test_another_config_is_refused_with_its_differences(uninterrupted: Path) -> None:
    base = from_json((uninterrupted / "config.json").read_text())
    optimizer = dataclasses.replace(base.optimizer, peak_lr=3e-2)
    with pytest.raises(ConfigError) as error:
        pretrain.pretrain(dataclasses.replace(base, optimizer=optimizer), uninterrupted)
    assert "optimizer.peak_lr: 0.01 there, 0.03 here" in str(error.value)
    assert "train.init_from" in str(error.value)


def test_fewer_steps_than_taken_are_refused(uninterrupted: Path) -> None:
    base: Config = from_json((uninterrupted / "config.json").read_text())
    fewer = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=5))
    with pytest.raises(ConfigError, match=r"train.steps=5 is less than the 16 steps"):
        pretrain.pretrain(fewer, uninterrupted)
