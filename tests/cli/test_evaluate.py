import dataclasses
import json
from pathlib import Path

import pytest

from mobilellm_jax.cli import main as cli
from mobilellm_jax.evaluate.engine import jax_engine
from mobilellm_jax.evaluate.perplexity import CutText, PerplexityResult, perplexity
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.open_model import open_model
from mobilellm_jax.quantize.parameters import quantized, stored_bytes
from mobilellm_jax.quantize.schemes import find_scheme
from tests import tiny
from tests.huggingface import write_huggingface

TEXT = "the cat sat\r\non the mat \u00e9\n" * 12
TINY = dataclasses.replace(tiny.MODEL, num_repeats=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a run, its export `hf`, and text.txt."""
    folder = tmp_path_factory.mktemp("runs")
    params = tiny.random_params(TINY)
    tokenizer = tiny.save_run(folder / "run", TINY, params)
    write_huggingface(TINY, params, tokenizer, folder / "hf")
    (folder / "text.txt").write_bytes(TEXT.encode())
    return folder


def measure(model: OpenedModel) -> PerplexityResult:
    text = CutText.cut(model.tokenizer, TEXT, model.config.max_seq_len, None)
    return perplexity(jax_engine(model.config, model.params), text)


def test_quantized_model_is_measured_and_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(folder / "run")
    args = [f"--checkpoint={folder / 'run'}", f"--perplexity={folder / 'text.txt'}"]
    expected = measure(model).loss
    found = []
    for parts in ("embedding,head", ""):
        flags = ["--quantize=w4a8g128", f"--quantized_parts={parts}"]
        assert cli.main(["evaluate", *args, *flags]) == 0
        printed = capsys.readouterr()
        record = json.loads(printed.out)
        assert record["quantize"].startswith("w4a8g128: matrices of the blocks in 4 bits")
        assert f"quantized {record['quantize']}" in printed.err
        scheme = find_scheme("w4a8g128", parts)
        params = quantized(model.params, scheme)
        assert f"{stored_bytes(params):,} bytes" in printed.err
        same = measure(dataclasses.replace(model, params=params)).loss
        assert record["loss"] == pytest.approx(same, rel=1e-4)
        found.append(record["loss"])
    assert len({expected, *found}) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quantize=w8a"], "Did you mean w8a8?"),
        (
            ["--quantize=w8a8", "--quantized_parts=kv"],
            "must be one of embedding, head, attention, cache",
        ),
        (["--quantize=w8a8", "--quantized_parts=head"], "name both or neither"),
        (["--quantized_parts=head"], "goes with --quantize only"),
    ],
)
def test_wrong_scheme_is_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    args = [f"--checkpoint={folder / 'run'}", f"--perplexity={folder / 'text.txt'}"]
    assert cli.main(["evaluate", *args, *flags]) == 2
    assert words in capsys.readouterr().err


def test_run_step_and_export_give_the_same_result(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(folder / "run")
    expected = measure(model)
    assert expected.windows > 1
    for name in ("run", "run/checkpoints/0", "hf"):
        output = tmp_path / "result.json"
        args = [f"--checkpoint={folder / name}", f"--perplexity={folder / 'text.txt'}"]
        assert cli.main(["evaluate", *args, f"--output={output}"]) == 0
        out = capsys.readouterr().out
        assert output.read_text() == out
        record = json.loads(out)
        # The export holds copies of the shared block, so float32 sums may have another order.
        assert record["loss"] == pytest.approx(expected.loss, abs=1e-6)
        assert record["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        assert record["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert (record["tokens"], record["windows"]) == (expected.tokens, expected.windows)
        assert record["file"] == str(folder / "text.txt")
        origin = folder / ("hf" if name == "hf" else "run/checkpoints/0")
        assert record["checkpoint"] == str(origin)


def test_a_window_can_be_shorter_than_the_model_and_longer_than_the_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(folder / "run")
    expected = perplexity(
        jax_engine(model.config, model.params), CutText.cut(model.tokenizer, TEXT, 16, None)
    )
    args = [f"--checkpoint={folder / 'run'}", f"--perplexity={folder / 'text.txt'}"]
    assert cli.main(["evaluate", *args, "--window=16"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["window"] == 16 and "note" not in record
    assert (record["tokens"], record["windows"]) == (15 * expected.windows, expected.windows)
    assert record["loss"] == pytest.approx(expected.loss, abs=1e-6)
    (tmp_path / "short.txt").write_text("the cat")
    count = len(model.tokenizer.encode("the cat"))
    args = [args[0], f"--perplexity={tmp_path / 'short.txt'}"]
    for flags in ([], ["--stride=8"]):
        assert cli.main(["evaluate", *args, *flags]) == 0
        printed = capsys.readouterr()
        record = json.loads(printed.out)
        assert record["note"] == f"the text has {count + 1} tokens, fewer than a window of 64"
        assert (record["tokens"], record["windows"]) == (count, 1)
        assert f"{record['note']}; all of it is one window" in printed.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--perplexity=gone.txt"], "--perplexity=gone.txt does not exist"),
        (["--perplexity=."], "--perplexity=. is a folder"),
        (["--perplexity=latin.txt"], "latin.txt must be UTF-8, but byte 3 is 0xe9"),
        (["--perplexity=empty.txt"], "--perplexity=empty.txt is empty"),
        (["--perplexity=text.txt", "--window=65"], "--window=65 must be at most model.max_seq_len"),
        (["--tasks=piqa", "--window=8"], "--window=8 does not go with --tasks"),
        (["--perplexity=text.txt", "--output=no/such/x.json"], "the folder no/such does not exist"),
        (["--perplexity=text.txt", "--output=."], "--output=. is a folder"),
        (["--perplexity=text.txt", "--checkpoint=rum"], "'rum' does not exist. Did you mean run?"),
        ([], "Give exactly one of --tasks and --perplexity."),
        (
            ["--perplexity=text.txt", "--tasks=piqa"],
            "Give exactly one of --tasks and --perplexity.",
        ),
        (
            ["--perplexity=text.txt", "--artifact=x"],
            "Give exactly one of --checkpoint and --artifact.",
        ),
        (["--perplexity=text.txt", "--limit=3"], "--limit=3 does not go with --perplexity"),
        (["--perplexity=text.txt", "--data_dir=x"], "--data_dir=x does not go with --perplexity"),
        (["--tasks=piqa", "--stride=8"], "--stride=8 does not go with --tasks"),
        (["--perplexity=text.txt", "--stride=65"], "--stride=65 must be at least 1 and at most"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(
    args: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    Path("empty.txt").write_text("")
    before = sorted(folder.iterdir())
    assert cli.main(["evaluate", "--checkpoint=run", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert sorted(folder.iterdir()) == before
