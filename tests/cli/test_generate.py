import dataclasses
import io
import re
import sys
from pathlib import Path

import pytest

from mobilellm_jax.cli import main as cli
from mobilellm_jax.cli.flags import define
from mobilellm_jax.data.tokenizers.tokenizer import prompt_ids
from mobilellm_jax.generation.generate import Request, generate, stream
from mobilellm_jax.generation.sampling import GREEDY, Sampling
from mobilellm_jax.generation.text_stream import decode_stream
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.open_model import open_model
from mobilellm_jax.quantize.parameters import quantized
from mobilellm_jax.quantize.schemes import find_scheme
from tests import tiny

command = cli.import_command("generate")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    tiny.save_run(folder, tiny.MODEL, tiny.random_params(tiny.MODEL))
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> OpenedModel:
    return open_model(run)


def continuation(
    model: OpenedModel, prompt: str, count: int, sampling: Sampling, number: int = 0
) -> str:
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(prompt)]
    eos = model.tokenizer.eos_id
    request = Request(
        [ids], max_new_tokens=count, sampling=sampling, end_ids=[eos], streams=[number]
    )
    [new] = generate(model.config, model.params, request)
    return model.tokenizer.decode([*ids, *new])


def test_flags_have_the_defaults_of_sampling() -> None:
    for field, value in dataclasses.asdict(Sampling()).items():
        assert define(command.Flags)[field].default == value


def test_prompt_is_continued(
    run: Path, model: OpenedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", f"--checkpoint={run}", "--prompt=the cat", "--max_new_tokens=30"]
    assert cli.main([*args, "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert out == continuation(model, "the cat", 30, GREEDY) + "\n"
    assert out.startswith("the cat")
    assert re.search(r"\[30 tokens in [\d.]+ s, [\d.]+ tokens/s once compiled\]", err)
    assert cli.main([*args, "--temperature=1.5", "--top_k=9", "--top_p=0.8", "--seed=4"]) == 0
    sampling = Sampling(temperature=1.5, top_k=9, top_p=0.8, seed=4)
    assert capsys.readouterr().out == continuation(model, "the cat", 30, sampling) + "\n"


def test_quantized_model_continues_as_its_integers_do(
    run: Path, model: OpenedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", f"--checkpoint={run}", "--prompt=the cat", "--max_new_tokens=30"]
    flags = ["--temperature=0", "--quantize=w4a8", "--quantized_parts=embedding,head,cache"]
    assert cli.main([*args, *flags]) == 0
    out, err = capsys.readouterr()
    params = quantized(model.params, find_scheme("w4a8", "embedding,head,cache"))
    integers = dataclasses.replace(model, params=params)
    assert out == continuation(integers, "the cat", 30, GREEDY) + "\n"
    assert out != continuation(model, "the cat", 30, GREEDY) + "\n"
    assert "quantized w4a8g32" in err and "not quantized: attention, norms" in err


def test_default_length_fits_the_model(
    run: Path, model: OpenedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "the cat sat"
    used = 1 + len(model.tokenizer.encode(prompt))
    assert cli.main(["generate", f"--checkpoint={run}", f"--prompt={prompt}"]) == 0
    expected = continuation(model, prompt, 64 - used, Sampling())
    assert capsys.readouterr().out == expected + "\n"


def test_piped_lines_are_continued_each(
    run: Path,
    model: OpenedModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the cat\n\nthe dog")))
    args = ["generate", f"--checkpoint={run}", "--max_new_tokens=12", "--seed=1"]
    assert cli.main(args) == 0
    prompts = enumerate(("the cat", "", "the dog"))
    texts = [continuation(model, p, 12, Sampling(seed=1), number) for number, p in prompts]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in texts)


def test_several_prompts_are_continued_together(
    run: Path, model: OpenedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["the cat", "", "the dog \u2028 sat"]
    args = ["generate", f"--checkpoint={run}", "--max_new_tokens=12", "--seed=3", "--batch_size=2"]
    assert cli.main([*args, *(f"--prompt={prompt}" for prompt in prompts)]) == 0
    out, err = capsys.readouterr()
    texts = [continuation(model, p, 12, Sampling(seed=3), n) for n, p in enumerate(prompts)]
    assert out == "".join(f"{text}\n" for text in texts)
    assert len(re.findall(r"\[\d+ tokens in", err)) == 2
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    assert cli.main([*args, f"--prompt_file={file}"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"a\xff", [], "must be UTF-8"),
        (b"", [], "is empty; name a file with text"),
        (None, [], "prompts.txt"),
        (b"a", ["--prompt=b"], "exclude each other"),
        (b"a\nb", ["--batch_size=0"], "batch_size"),
        (b"a\n" + b"z" * 70, [], "shorten the prompt"),
    ],
)
def test_prompt_file_that_cannot_be_used_ends_with_2(
    content: bytes | None,
    flags: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["generate", f"--checkpoint={run}", f"--prompt_file={file}", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_piped_line_that_does_not_fit_ends_with_2(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"z" * 70)))
    assert cli.main(["generate", f"--checkpoint={run}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "model.max_seq_len=64; shorten the prompt." in err


def test_piped_bytes_that_are_not_utf8_end_with_2(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    assert cli.main(["generate", f"--checkpoint={run}"]) == 2
    assert "standard input must be UTF-8" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_conversation_goes_on_after_a_mistake_until_the_end_of_input(
    run: Path,
    model: OpenedModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = iter(["z" * 70, "the dog"])

    def answer(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", answer)
    args = ["generate", f"--checkpoint={run}", "--max_new_tokens=9", "--temperature=0"]
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert out == continuation(model, "the dog", 9, GREEDY) + "\n"
    assert "shorten the prompt" in err


def test_control_characters_are_harmless_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, file = Terminal(), io.StringIO()
    for output in (terminal, file):
        monkeypatch.setattr(sys, "stdout", output)
        command._show("a\x1b[2Jb\x00\x7f\n\t\u00e9")
    assert terminal.getvalue() == "a\u241b[2Jb\u2400\u2421\n\t\u00e9"
    assert file.getvalue() == "a\x1b[2Jb\x00\x7f\n\t\u00e9"


def test_text_appears_while_it_is_drawn(
    run: Path, model: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(command, "_show", shown.append)
    args = ["generate", f"--checkpoint={run}", "--prompt=the", "--max_new_tokens=40"]
    assert cli.main(args) == 0
    ids = prompt_ids(model.tokenizer, "the")
    request = Request([ids], max_new_tokens=40, end_ids=[model.tokenizer.eos_id])
    chunks = (part for [part] in stream(model.config, model.params, request))
    pieces = decode_stream(model.tokenizer, ids, chunks)
    assert shown == ["the", *pieces]
    assert len(shown) > 4


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--temperature=-1", "temperature=-1.0 must be a number of at least 0"),
        ("--top_p=0", "top_p=0.0 must be greater than 0"),
        ("--top_k=-3", "top_k=-3 must be at least 0"),
        ("--seed=-1", "seed=-1 must be at least 0"),
        ("--max_new_tokens=0", "max_new_tokens"),
        ("--max_new_tokens=64", "max_new_tokens=64 exceed model.max_seq_len=64"),
        ("--checkpoint=nowhere", "checkpoint='nowhere' does not exist"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(
    flag: str, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", f"--checkpoint={run}", "--prompt=a", flag]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
