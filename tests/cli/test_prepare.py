from pathlib import Path

import pytest

from mobilellm_jax.cli.main import main
from mobilellm_jax.data.shards import open_tokens


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"The text of {name} is about the river. " * 20)
    return ["prepare", f"--source=text:{tmp_path}/[ab].txt", f"--output={tmp_path / 'data'}"]


def test_prepare_and_prepare_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"--source=text:{tmp_path}/c.txt", "--vocab_size=290", "--validation_fraction=0.4"]
    assert main([*arguments, *more]) == 0
    manifest = open_tokens(tmp_path / "data").manifest
    assert manifest.vocab_size == 290
    assert manifest.settings["validation_fraction"] == 0.4
    assert [source.spec for source in manifest.sources] == [
        f"text:{tmp_path}/{pattern}.txt" for pattern in ("[ab]", "c")
    ]
    tokens = manifest.splits["train"].tokens
    assert f"{tokens:,} tokens" in capsys.readouterr().err
    assert main([*arguments, *more]) == 0
    assert "nothing to do" in capsys.readouterr().err
    reuse = [f"--output={tmp_path / 'more'}", f"--tokenizer={tmp_path / 'data'}"]
    assert main([*arguments, *reuse]) == 0
    assert open_tokens(tmp_path / "more").manifest.tokenizer_sha256 == manifest.tokenizer_sha256


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give exactly one"),
        (["--vocab_size=290", "--tokenizer=x.model"], "give exactly one"),
        (["--tokenizer=x.model"], "tokenizer='x.model': no tokenizer file there"),
        (["--vocab_size=9999"], "vocab_size=9999 is too large for this text"),
        (["--vocab_size=290", "--source=txt:*"], "Did you mean text?"),
        (["--vocab_size=290", "--source=text:nowhere/*"], "the pattern matches nothing"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str],
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_is_one_message_from_workers_too(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.txt").write_text("The river is deep. " * 50)
    tokenizer = ["prepare", f"--source=text:{tmp_path}/good.txt", f"--output={tmp_path}/tokenizer"]
    assert main([*tokenizer, "--vocab_size=275", "--validation_fraction=0"]) == 0
    (tmp_path / "a.jsonl").write_text('{"text": "river"}\n{"text": 5}\n' * 2)
    arguments = ["prepare", f"--source=jsonl:{tmp_path}/a.jsonl", f"--output={tmp_path}/data"]
    arguments += [f"--tokenizer={tmp_path}/tokenizer", "--validation_fraction=0"]
    assert main([*arguments, f"--source=text:{tmp_path}/good.txt", f"--workers={workers}"]) == 2
    error = capsys.readouterr().err
    assert "a.jsonl, line 2, byte 18" in error
    assert "Traceback" not in error


def test_weights_and_skipped_lines_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the river is deep"}\n{"text": 5}\n' * 20)
    (tmp_path / "b.txt").write_text("The mountain is high. " * 50)
    arguments = ["prepare", f"--source=jsonl:{tmp_path}/a.jsonl", f"--output={tmp_path}/data"]
    arguments += [f"--source=text:{tmp_path}/b.txt", "--vocab_size=280", "--validation_fraction=0"]
    assert main([*arguments, "--weight=0.25"]) == 2
    assert "weight=[0.25] must be given once for each of the 2 sources" in capsys.readouterr().err
    arguments += ["--weight=0.25", "--weight=0.75", "--on_bad_line=skip"]
    assert main(arguments) == 0
    assert "WARNING: 20 bad lines were left out" in capsys.readouterr().err
    sources = open_tokens(tmp_path / "data").manifest.sources
    assert [source.weight for source in sources] == [0.25, 0.75]
    assert [len(source.bad_lines) for source in sources] == [20, 0]
