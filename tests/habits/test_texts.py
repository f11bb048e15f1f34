"""Prompts, texts and scores as people use them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm_jax.cli import main as cli
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "run"
    params = tiny.random_params(tiny.MODEL)
    # The first tokens are bytes. If they are unlikely, the model writes words.
    params["embedding"]["table"] *= np.where(np.arange(300) < 259, 0.01, 6.0)[:, None]
    tiny.save_run(folder, tiny.MODEL, params)
    return folder


def generated(run: Path, prompts: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Returns the output of `generate` for a file of prompts."""
    args = ["generate", f"--checkpoint={run}", f"--prompt_file={prompts}", *flags]
    assert cli.main(args) == 0
    return capsys.readouterr().out


def test_somebody_asks_for_sixteen_texts_by_repeating_a_prompt(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "same.txt"
    file.write_text("the cat\n" * 16)
    flags = ["--max_new_tokens=9", "--temperature=3", "--top_p=1"]
    texts = generated(run, file, capsys, *flags)
    assert len(set(f"\n{texts}".split("\nthe cat"))) == 1 + 16
    assert generated(run, file, capsys, *flags, "--batch_size=3") == texts
    assert generated(run, file, capsys, *flags, "--seed=1") != texts


def test_somebody_pipes_the_prompts_that_were_in_a_file(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\nthe dog\nthe cat\n")
    texts = generated(run, file, capsys, "--max_new_tokens=9")
    with file.open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        assert cli.main(["generate", f"--checkpoint={run}", "--max_new_tokens=9"]) == 0
    assert capsys.readouterr().out == texts


def test_somebody_has_one_prompt_that_is_too_long(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("the cat\nthe dog\n" + "z" * 70 + "\nthe mat\n" + "y" * 90 + "\n")
    assert cli.main(["generate", f"--checkpoint={run}", f"--prompt_file={file}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"line 3 of {file}: A prompt of" in err and f"line 5 of {file}: A prompt of" in err
    # The remedy is a shorter prompt.
    file.write_text("the cat\nthe dog\nz\nthe mat\ny\n")
    assert len(generated(run, file, capsys, "--max_new_tokens=5").splitlines()) >= 5


def test_a_long_prompt_does_not_shorten_the_other_texts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\n")
    alone = generated(run, file, capsys, "--temperature=0")
    file.write_text("the cat\n" + "z" * 55 + "\n")
    assert generated(run, file, capsys, "--temperature=0").startswith(alone)


class Evaluation:
    """Tasks of lm-evaluation-harness with a tiny model; keeps its answers in a journal."""

    def __init__(self, run: Path, folder: Path, names: list[str]) -> None:
        pytest.importorskip("lm_eval", reason="the eval extra")
        from mobilellm_jax.evaluate.engine import jax_engine
        from mobilellm_jax.evaluate.tasks import load_tasks
        from mobilellm_jax.open_model import open_model
        from tests.evaluate.example_rows import write_rows

        write_rows(folder)
        self.tasks = load_tasks(names, data_dir=folder)
        self.opened = open_model(run)
        self.engine = jax_engine(self.opened.config, self.opened.params)

    def asks(self, task: str, *, repeats: int = 1, **settings: object) -> None:
        """Changes the settings with which a task asks for texts."""
        config = self.tasks.loaded["tasks"][task].config
        config.repeats = repeats
        config.generation_kwargs = {"until": ["\n"], "max_gen_toks": 9, **settings}

    def texts(self, task: str, journal: Path | None = None, limit: int = 2) -> list[list[str]]:
        """Runs all tasks and returns the texts of every document of one task."""
        from mobilellm_jax.evaluate.harness import HarnessModel
        from mobilellm_jax.evaluate.journal import Journal
        from mobilellm_jax.evaluate.tasks import run_tasks

        answers = Journal(journal, {})
        model = HarnessModel(self.engine, self.opened.tokenizer, answers, origin="", show=False)
        run_tasks(model, self.tasks, limit)
        return [each.resps for each in self.tasks.loaded["tasks"][task].instances]


@pytest.fixture(scope="module")
def evaluation(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return Evaluation(run, tmp_path_factory.mktemp("rows"), ["triviaqa", "piqa"])


SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 2.0}


def test_somebody_scores_pass_at_4_which_needs_four_different_texts(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    evaluation.asks("triviaqa", repeats=4, **SAMPLED)
    texts = evaluation.texts("triviaqa")
    assert [len(set(samples)) for samples in texts] == [4, 4]
    # A document has the same texts if it is evaluated alone.
    assert evaluation.texts("triviaqa", limit=1) == texts[:1]
    # The evaluation was killed after some texts. The same command gives the texts of one run.
    journal = tmp_path / "journal"
    assert evaluation.texts("triviaqa", journal) == texts
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-3]))
    assert evaluation.texts("triviaqa", journal) == texts


def test_somebody_runs_a_task_that_says_one_beam(evaluation: Evaluation) -> None:
    evaluation.asks("triviaqa")
    greedy = evaluation.texts("triviaqa")
    evaluation.asks("triviaqa", num_beams=1, repetition_penalty=1.0)
    assert evaluation.texts("triviaqa") == greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams=4, which is not supported"),
        ({"typical_p": 0.9, "min_p": 0.1}, "min_p=0.1, typical_p=0.9"),
        ({"max_gen_toks": 0}, "at least 1"),
        ({"do_sample": True, "temperature": -1}, "temperature=-1.0 must be"),
        ({"max_gen_toks": "many"}, "impossible setting"),
        ({"until": [1]}, "until=1"),
    ],
)
def test_a_task_that_cannot_be_served_ends_before_any_likelihood(
    evaluation: Evaluation,
    settings: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mobilellm_jax.evaluate.scoring import Scorer

    evaluation.asks("triviaqa", **settings)
    monkeypatch.setattr(Scorer, "scores", None)  # A likelihood would raise a TypeError.
    with pytest.raises(ValueError, match=f"The task triviaqa asks for texts .*{message}"):
        evaluation.texts("piqa")
