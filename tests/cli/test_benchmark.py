"""`mobilellm benchmark` on checkpoints; tests/export measures exports with their runtimes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from mobilellm_jax.benchmark.measure import MeasuringError, Request, measure_all
from mobilellm_jax.benchmark.table import summarize
from mobilellm_jax.cli import main as cli
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.evaluate.engine import jax_engine
from mobilellm_jax.evaluate.perplexity import CutText, perplexity
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.model.transformer import init_params
from mobilellm_jax.open_model import open_model
from mobilellm_jax.quantize.parameters import quantize_model, stored_bytes
from mobilellm_jax.quantize.schemes import find_scheme
from tests.huggingface import write_huggingface

CONFIG = ModelConfig(
    vocab_size=290,
    embed_dim=16,
    num_blocks=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    max_seq_len=64,
)
TEXT = "The quick brown fox jumps over the lazy dog. " * 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    tokenizer = train_tokenizer([TEXT] * 9, 290, folder / "x.model")
    params = init_params(CONFIG, jax.random.key(0))
    write_huggingface(CONFIG, params, tokenizer, folder / "model")
    return folder / "model"


@pytest.mark.slow
def test_a_checkpoint_is_measured_in_separate_processes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    flags = [f"--artifact={checkpoint}", f"--output={tmp_path / 'out'}", f"--text={text}"]
    lengths = ["--prompt_tokens=16", "--new_tokens=40", "--runs=1", "--rounds=2"]
    assert cli.main(["benchmark", *flags, *lengths, "--quantize=w4a8"]) == 0
    assert "| model | JAX" in capsys.readouterr().out
    measured = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [len(each["decode_sec"]) for each in measured] == [2, 2]
    assert [each["precision"] for each in measured] == ["float32", "w4a8g32"]
    assert all(each["load_sec"] > 0 and each["memory_bytes"] > 0 for each in measured)
    assert min(sec for each in measured for sec in each["prefill_sec"] + each["decode_sec"]) > 0
    opened = open_model(checkpoint)
    cut = CutText.cut(opened.tokenizer, TEXT, 64, stride=64)
    expected = perplexity(jax_engine(opened.config, opened.params), cut)
    assert measured[0]["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert measured[0]["model_bytes"] == 4 * parameter_count(CONFIG)
    params = quantize_model(opened.config, opened.params, find_scheme("w4a8"))
    expected = perplexity(jax_engine(opened.config, params), cut)
    assert measured[1]["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert measured[1]["model_bytes"] == stored_bytes(params)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {f"benchmark.{kind}" for kind in ("md", "csv", "json", "png")}


def request_of(path: Path | str) -> Request:
    return Request(path=str(path), prompt_tokens=8, new_tokens=8, rounds=1, text=TEXT)


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        request = json.loads(settings["input"])
        asked.append(request["path"])
        times = {"prefill_sec": [1.0], "decode_sec": [1.0], "load_sec": 1.0, "init_sec": 1.0}
        sizes = {"model_bytes": 8, "memory_bytes": len(asked), "loss": 1.0}
        names = {"path": request["path"], "runtime": "none", "precision": "float32"}
        found = {**names, **times, **sizes, "model": dataclasses.asdict(CONFIG)}
        return subprocess.CompletedProcess(command, 0, f"a line\n{json.dumps(found)}\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    measured = measure_all([request_of("one"), request_of("two")], runs=3)
    assert asked == ["one", "two"] * 3
    assert [[each.memory_bytes for each in model] for model in measured] == [[1, 3, 5], [2, 4, 6]]
    assert [summarize(each, 8).memory_megabytes for each in measured] == [3e-6, 4e-6]


def test_the_picture_needs_the_report_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["benchmark", "--artifact=one", "--output=out"]) == 2
    assert "pip install 'mobilellm-jax[report]'" in capsys.readouterr().err


def test_the_message_of_a_failed_process_is_shown(tmp_path: Path) -> None:
    with pytest.raises(MeasuringError, match=r"gone ended with 1:\n(.|\n)*does not exist"):
        measure_all([request_of(tmp_path / "gone")], runs=1)


def test_bad_input_is_refused_before_anything_is_measured(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    output = f"--output={tmp_path / 'out'}"
    for flags, message in (
        ([f"--artifact={checkpoint}x"], "does not exist. Did you mean model?"),
        ([f"--artifact={checkpoint}"], "--prompt_tokens=128 and --new_tokens=64 and one more must"),
        ([f"--artifact={checkpoint / 'model.safetensors'}"], "has no manifest.json"),
        ([f"--artifact={checkpoint}", "--new_tokens=0"], "new_tokens"),
        ([f"--artifact={checkpoint}", "--quantize=w9"], "quantize='w9' must be one of w8a8"),
        (["--text=x"], "--artifact is missing"),
    ):
        assert cli.main(["benchmark", *flags, output]) == 2
        assert message in capsys.readouterr().err
    short = [f"--artifact={checkpoint}", "--prompt_tokens=8", "--new_tokens=8", output]
    for name in ("empty", "latin"):
        assert cli.main(["benchmark", *short, f"--text={tmp_path / name}.txt"]) == 2
        assert "--text=" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
