import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from mobilellm_jax.cli import main as cli
from mobilellm_jax.evaluate.scoring import Scorer
from mobilellm_jax.model.transformer import init_params
from tests import tiny
from tests.evaluate.example_rows import write_rows
from tests.huggingface import write_huggingface

TINY = dataclasses.replace(tiny.MODEL, max_seq_len=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a run, its export `hf`, and the rows of tasks, `evals`."""
    folder = tmp_path_factory.mktemp("runs")
    params = init_params(TINY, jax.random.key(0))
    tokenizer = tiny.save_run(folder / "run", TINY, params)
    write_huggingface(TINY, params, tokenizer, folder / "hf")
    write_rows(folder / "evals")
    return folder


def evaluate(folder: Path, *args: str, checkpoint: str = "run") -> int:
    data_dir = f"--data_dir={folder / 'evals'}"
    return cli.main(["evaluate", f"--checkpoint={folder / checkpoint}", data_dir, *args])


def test_a_run_and_its_export_score_alike(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra")
    found = []
    for checkpoint in ("run", "hf"):
        output = tmp_path / "scores.json"
        args = ["--tasks=piqa,triviaqa,wikitext", "--num_fewshot=1", f"--output={output}"]
        assert evaluate(folder, *args, checkpoint=checkpoint) == 0
        out, err = capsys.readouterr()
        assert "MobileLLM-125M, which is nearest in size" in out and "\npiqa " in out
        assert (
            "word_perplexity" in out
        )  # the harness' table shows the tasks that the paper does not have
        assert "longer than model.max_seq_len=128" in err
        results = json.loads(output.read_text())
        assert results["n-shot"] == {"piqa": 1, "triviaqa": 1, "wikitext": 0}
        found.append(results["results"])
        assert sorted(tmp_path.iterdir()) == [output]  # no journal is left
    for task, values in found[0].items():
        for name, value in values.items():
            # The order of float32 sums may differ.
            close = isinstance(value, float)
            assert found[1][task][name] == (pytest.approx(value, rel=1e-4) if close else value)


def test_a_killed_evaluation_continues_where_it_stopped(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra")
    output = tmp_path / "scores.json"
    args = ["--tasks=piqa,wikitext", "--limit=2", f"--output={output}"]
    scores = Scorer.scores

    def scores_until_killed(self: Scorer, *args: Any) -> Any:
        if calls:
            raise SystemExit(9)
        calls.append(0)
        yield from scores(self, *args)

    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "scores", scores_until_killed)
        with pytest.raises(SystemExit):
            evaluate(folder, *args)
    journal = tmp_path / "scores.json.journal"
    assert not output.exists()
    first = len(journal.read_text().splitlines()) - 1
    assert first > 0
    capsys.readouterr()

    asked: list[int] = []

    def counted(self: Scorer, params: Any, queries: Any) -> Any:
        asked.append(len(queries))
        return scores(self, params, queries)

    monkeypatch.setattr(Scorer, "scores", counted)
    assert evaluate(folder, *args) == 0
    assert f"{journal} has {first} answers; continuing from there." in capsys.readouterr().err
    resumed = json.loads(output.read_text())["results"]
    again = sum(asked)
    assert evaluate(folder, *args) == 0
    assert sum(asked) - again == again + first  # without a journal, everything is asked again
    for task, values in json.loads(output.read_text())["results"].items():
        for name, value in values.items():
            # The rows are packed differently, so float32 sums have another order.
            close = isinstance(value, float)
            assert resumed[task][name] == (pytest.approx(value, rel=1e-4) if close else value)
    assert not journal.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks=pica"], "no task 'pica'. Did you mean piqa?"),
        (["--tasks=piqa", "--checkpoint=rum"], "'rum' does not exist. Did you mean run?"),
        (["--tasks=piqa", "--num_fewshot=5"], "fewshot.jsonl has 5 rows"),
        (["--tasks=piqa", "--data_dir=gone"], "--data_dir=gone is not a folder"),
        (["--tasks=piqa", "--limit=0"], "--limit=0"),
        (["--tasks=boolq", "--data_dir=damaged"], "validation.jsonl, line 1: passage is missing."),
        (["--tasks=boolq", "--output=."], "--output=. is a folder"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(
    args: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra")
    monkeypatch.chdir(folder)
    Path("damaged/boolq").mkdir(parents=True, exist_ok=True)
    Path("damaged/boolq/validation.jsonl").write_text('{"question": "is it", "label": 1}\n')
    before = sorted(folder.iterdir())
    assert cli.main(["evaluate", "--checkpoint=run", "--data_dir=evals", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert sorted(folder.iterdir()) == before


def test_without_the_harness_the_extra_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluate(folder, "--tasks=piqa") == 2
    assert "pip install 'mobilellm-jax[eval]'" in capsys.readouterr().err
