import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobilellm_jax.cli.main import main
from mobilellm_jax.data.preparation.prepare import prepare

ROOT = Path(__file__).parent.parent.parent
# These characters clear a terminal, ring its bell and reverse the direction of writing.
HOSTILE = "\x1b[2J\x07\u202e \u2581 日本 \\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = tmp_path_factory.mktemp("corpus")
    for name in "abc":
        text = f"The text of {name} is about the river. {HOSTILE}\n" * 20
        (corpus / f"{name}.txt").write_text(text, encoding="utf-8")
    prepare([f"text:{corpus}/*.txt"], corpus / "data", vocab_size=300, workers=1)
    return corpus / "data"


def test_counts_and_windows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"--data={folder}", "--sample=2", "--seq_len=64"]) == 0
    out = capsys.readouterr().out
    assert "every checksum is right" in out
    assert "Window 2 of 2, data: 64 tokens, 64 targets" in out
    assert r"\x1b[2J\x07\u202e ▁ 日本 \\n\n" in out.replace("\n  ", "")
    assert all(line.isprintable() for line in out.split("\n"))


def test_the_defaults_are_those_of_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", f"--data={folder}"]) == 0
    by_default = capsys.readouterr().out
    more = ["--sample=3", "--seq_len=2048", "--boundaries=concat", "--seed=0"]
    assert main(["inspect", f"--data={folder}", *more]) == 0
    assert capsys.readouterr().out == by_default
    assert main(["inspect", f"--data={folder}", "--sample=0"]) == 0
    assert by_default.startswith(capsys.readouterr().out)


def test_flags_reach_the_windows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = set()
    for more in ([], ["--seed=1"], ["--boundaries=document_mask"], ["--seq_len=65"]):
        given = [f"--data={folder}", "--sample=50", "--seq_len=64"]
        assert main(["inspect", *given, *more]) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 4


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_can_write_it(encoding: str, folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mobilellm_jax", "inspect", f"--data={folder}", "--seq_len=64"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Window 3 of 3" in result.stdout.decode(encoding)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data=nowhere"], "Token folder nowhere does not exist"),
        (["--data={folder}:1,nowhere:1"], "Token folder nowhere does not exist"),
        (["--data={folder}:1,nowhere:x"], "'nowhere:x' must be a folder and its weight"),
        ([], "--data is missing"),
        (["--data={folder}", "--sample=-1"], "sample"),
        (["--data={folder}", "--seq_len=0"], "seq_len"),
        (["--data={folder}", "--boundaries=none"], "boundaries"),
        (["--data={folder}", "--samples=1"], "Did you mean --sample?"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    more: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *(flag.format(folder=folder) for flag in more)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_damaged_file_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    [damaged] = tmp_path.glob("train-*.tokens")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x10
    damaged.write_bytes(content)
    assert main(["inspect", f"--data={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert f"mobilellm inspect: {damaged} has SHA-256" in error
    assert "Traceback" not in error
