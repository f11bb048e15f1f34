"""Every command in README, docs/, configs/ and the help works as it is written.

The default tests run a command until its work would start. The soak test runs the work as well, on
a tiny model under the names that the commands use.
"""

import dataclasses
import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from mobilellm_jax.cli.flags import parse
from mobilellm_jax.cli.main import COMMANDS, import_command, main
from mobilellm_jax.config import to_json
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.errors import FAILED
from mobilellm_jax.export.formats import FORMATS
from tests.documented import ROOT, documented_commands
from tests.tiny import MODEL, RUN, prepared_words, random_params, save_run

LONG = dataclasses.replace(MODEL, max_seq_len=1024)  # for --stride=512
ALL = list(documented_commands())
_NOT_PLANNED = ("--topology", "--launcher", "--sbatch_args")


def args_of(command: str) -> list[list[str]]:
    """Returns the different argument lists of a command."""
    return [list(args) for args in dict.fromkeys(tuple(a) for _, a in ALL if a[0] == command)]


def shown(args: list[str]) -> str:
    return " ".join(args)


def test_every_command_has_an_example_in_its_help() -> None:
    assert {place for place, _ in ALL} >= {*COMMANDS, "README.md", "training.md", "quickstart.py"}
    assert len(ALL) > 80


@pytest.mark.parametrize(("place", "args"), ALL, ids=lambda value: shown(value)[:60])
def test_flags_of_a_documented_command(place: str, args: list[str]) -> None:
    name, *rest = args
    values, _ = parse(name, import_command(name).Flags, rest)
    assert isinstance(values, import_command(name).Flags)


@pytest.mark.parametrize("args", args_of("train"), ids=shown)
def test_documented_training_has_a_valid_config(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    kept = [arg for arg in args if not arg.startswith("--config.model=")]  # needs a checkpoint
    assert main([*kept, "--show_config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("args", args_of("sweep"), ids=shown)
def test_documented_sweep_can_be_planned(
    args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    kept = [arg for arg in args if not arg.startswith((*_NOT_PLANNED, "--workdir"))]
    plan = ["--plan", "--flops_per_sec=1e12", f"--workdir={tmp_path / 'sweep'}"]
    # The texts of the larger recipes do not exist here, and a plan needs none.
    plan += ["--config.data.path=none", "--config.data.source=python_docs"]
    assert main([*kept, *plan]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("args", args_of("plan"), ids=shown)
def test_documented_plan_can_be_counted(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    # The slice of the example has more devices than this machine, so the count uses one mesh axis.
    kept = [arg for arg in args if not arg.startswith(("--topology", "--config.mesh"))]
    # A model of 1.5B parameters may not fit the machine of the test, and a plan then ends with 1.
    assert main(kept) in (0, FAILED), capsys.readouterr().err


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder where the names in the documented commands stand for tiny files."""
    folder = tmp_path_factory.mktemp("kitchen")
    data = dataclasses.replace(RUN.data, path="data/python_docs")
    for file in (ROOT / "configs").rglob("*.py"):
        stand_in = folder / file.relative_to(ROOT)
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(to_json(dataclasses.replace(RUN, data=data)))
    for name in ("quickstart", "ls", "mine", "quickstart_w4a8", "quickstart_w8a8"):
        save_run(folder / "runs" / name, LONG, random_params(LONG))
    for name, layout in (("hf", "hf"), ("ls", "mobilellm")):
        flags = [f"--checkpoint={folder}/runs/ls", f"--output={folder}/exported/{name}"]
        assert main(["export", *flags, f"--format={layout}", "--noverify"]) == 0
    (folder / "words").mkdir()
    prepared_words(folder / "words")
    words, tokenizer = f"text:{folder}/words/*.txt", folder / "runs" / "tokenizer.model"
    for name in ("python_docs", "web", "code", "mine", "mix", "pretrain"):
        tokens = folder / "data" / name
        prepare([words], tokens, tokenizer=tokenizer, validation_fraction=0.1)
    steps = folder / "runs" / "quickstart" / "checkpoints"
    shutil.copytree(steps / "0", steps / "400")
    shutil.copy(folder / "runs" / "tokenizer.model", folder)
    for name in ("README.md", "wiki.txt", "prompts.txt"):
        shutil.copy(ROOT / "README.md", folder / name)
    shutil.copytree(ROOT / "docs", folder / "docs")
    for number, text in enumerate((ROOT / "README.md").read_text().split("\n\n")):
        (folder / "books" / "a").mkdir(parents=True, exist_ok=True)
        (folder / "books" / "a" / f"{number}.txt").write_text(text)
    for name in ("tiny", "tuned", "look"):
        shutil.copytree(folder / "runs" / "ls", folder / "runs" / name / "runs" / "a")
    lines = (ROOT / "README.md").read_text().splitlines()
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    return folder


# These commands need what the test's machine does not have.
_ELSEWHERE = {
    "--tasks": "lm-evaluation-harness downloads the rows",
    "--topology": "a compilation for a TPU takes minutes",
    "jsonl:web": "the files have gigabytes",
    "downloads/": "the weights are downloaded",
    "exported/q8": "llama.cpp is in an environment of its own",
    "exported/gguf": "llama.cpp is in an environment of its own",
}


def works_here(args: list[str]) -> bool:
    forms = [form for name, form in FORMATS.items() if f"--format={name}" in args]
    installed = all(find_spec(package) for form in forms for package in form.write_packages)
    # Sweeps take minutes; the test above plans them.
    return installed and args[0] != "sweep" and not any(word in shown(args) for word in _ELSEWHERE)


@pytest.mark.soak
def test_documented_commands_work(
    kitchen: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kitchen)
    for place, args in filter(lambda pair: works_here(pair[1]), ALL):
        # Later commands open the stand-ins, so training and preparation write elsewhere.
        changes = ["--workdir=new", "--config.train.steps=16"] if args[0] == "train" else []
        changes += ["--output=new"] if args[0] == "prepare" else []
        changes += ["--vocab_size=600"] if "--vocab_size=" in shown(args) else []
        if "--config.model.vocab_size=" in shown(args):
            changes.append(f"--config.model.vocab_size={MODEL.vocab_size}")
        made = [arg.partition("=")[2] for arg in args if arg.startswith("--output=")]
        for output in ["new", *(made if args[0] in ("export", "import") else ())]:
            shutil.rmtree(output, ignore_errors=True)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat\n")))
        assert main([*args, *changes]) == 0, (place, args, capsys.readouterr().err)
        capsys.readouterr()
