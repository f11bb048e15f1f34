"""Prompts, texts and scores as people use them."""

import dataclasses
import inspect
import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.cli import main as cli
from mobilellm_jax.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mobilellm_jax.errors import NotFiniteError, UserError
from mobilellm_jax.evaluate.engine import RuntimeEngine
from mobilellm_jax.export.runtime import Runtime
from mobilellm_jax.generation.generate import Request, generate
from mobilellm_jax.generation.sampling import GREEDY, Sampling
from mobilellm_jax.model import block
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.paper.architectures import ffn_width
from mobilellm_jax.storage import strict_json
from mobilellm_jax.train.optimizer import learning_rate, make_optimizer
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
        engine = jax_engine(self.opened.config, self.opened.params)
        self.engine = dataclasses.replace(engine, prompts_at_once=4)

    def asks(self, task: str, *, repeats: int = 1, **settings: object) -> None:
        """Changes the settings with which a task asks for texts."""
        config = self.tasks.loaded["tasks"][task].config
        config.repeats = repeats
        config.generation_kwargs = {"until": ["\n"], "max_gen_toks": 9, **settings}

    def scores(self, task: str) -> dict[str, Any]:
        """Returns the scores of one document of a task, as the JSON of `--output` has them."""
        from mobilellm_jax.evaluate.tasks import as_json, quick_scores

        scores = strict_json.parse(as_json(quick_scores(self.model(), self.tasks, 1)))
        return {name.removeprefix(f"{task}/"): value for name, value in scores.items()}

    def model(self, journal: Path | None = None) -> Any:
        from mobilellm_jax.evaluate.harness import HarnessModel
        from mobilellm_jax.evaluate.journal import Journal

        answers = Journal(journal, {})
        return HarnessModel(self.engine, self.opened.tokenizer, answers, origin="", show=False)

    def texts(self, task: str, journal: Path | None = None, limit: int = 2) -> list[list[str]]:
        """Runs all tasks and returns the texts of every document of one task."""
        from mobilellm_jax.evaluate.tasks import run_tasks

        run_tasks(self.model(journal), self.tasks, limit)
        return [each.resps for each in self.tasks.loaded["tasks"][task].instances]


@pytest.fixture(scope="module")
def evaluation(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return Evaluation(run, tmp_path_factory.mktemp("rows"), ["piqa", "triviaqa"])


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
    # The texts are the last answers in the journal, because the likelihoods come first.
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


def test_somebody_runs_a_task_that_runs_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra")
    from mobilellm_jax.evaluate.tasks import Tasks, check_tasks

    task = types.SimpleNamespace(UNSAFE_CODE=True, instances=[], build_all_requests=lambda limit: 0)
    tasks: Any = Tasks({"tasks": {"humaneval": task}}, manager=None)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(UserError, match="humaneval runs the programs .* set HF_ALLOW_CODE_EVAL=1"):
        check_tasks(tasks, tiny.MODEL, draws=True)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    check_tasks(tasks, tiny.MODEL, draws=True)


def test_somebody_evaluates_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra")
    from lm_eval.tasks import TaskManager

    def offline(*_: object) -> None:
        raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr(TaskManager, "load", offline)
    assert cli.main(["evaluate", f"--checkpoint={run}", "--tasks=piqa"]) == 2
    assert "check the network and the free space, or read local files" in capsys.readouterr().err


def test_somebody_saved_the_prompts_with_a_windows_editor(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\nthe dog\n")
    texts = generated(run, file, capsys, "--max_new_tokens=5")
    file.write_bytes(b"\xef\xbb\xbfthe cat\r\nthe dog\r\n")
    assert generated(run, file, capsys, "--max_new_tokens=5") == texts
    file.write_bytes(b"the\rcat\nthe dog\n")
    assert generated(run, file, capsys, "--max_new_tokens=5").startswith("the\rcat")


def test_somebody_has_a_terminal_that_is_not_utf8(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="latin-1"))
    args = ["generate", f"--checkpoint={run}", "--max_new_tokens=5"]
    assert cli.main([*args, "--prompt=caf\u00e9 \u65e5\u672c"]) == 0
    assert output.getvalue().startswith(b"caf\xe9 \\u65e5\\u672c")


def test_somebody_types_an_accent_in_a_container_without_a_locale(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", f"--checkpoint={run}", "--max_new_tokens=5"]
    assert cli.main([*args, "--prompt=caf\u00e9"]) == 0
    text = capsys.readouterr().out
    as_ascii = "caf\u00e9".encode().decode("ascii", "surrogateescape")
    assert cli.main([*args, f"--prompt={as_ascii}"]) == 0
    assert capsys.readouterr().out == text
    assert cli.main([*args, "--prompt=caf\udce9"]) == 2
    assert "--prompt='caf\\udce9': Character 3" in capsys.readouterr().err


def test_generate_says_that_it_compiles_and_for_which_size(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\nthe dog\n" * 2)
    args = ["generate", f"--checkpoint={run}", f"--prompt_file={file}", "--batch_size=2"]
    assert cli.main([*args, "--max_new_tokens=5"]) == 0
    assert capsys.readouterr().err.count("compiling for 2 x 64 tokens") == 1


def scaled(folder: Path, factor: float) -> Path:
    """Returns a run whose output matrix is multiplied by a factor."""
    params = tiny.random_params(tiny.MODEL)
    params["final_norm"]["scale"] *= np.float32(factor)
    tiny.save_run(folder / "run", tiny.MODEL, params)
    return folder / "run"


def test_somebody_opens_weights_that_are_not_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, text = scaled(tmp_path, np.nan), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 30)
    for args in (["generate", "--prompt=the cat"], ["evaluate", f"--perplexity={text}"]):
        assert cli.main([args[0], f"--checkpoint={broken}", *args[1:]]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "not finite" in err or "NaN" in err


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_finite_weights_whose_logits_overflow_write_no_text(sampling: Sampling) -> None:
    params = tiny.random_params(tiny.MODEL)
    params["final_norm"]["scale"] *= np.float32(1e38)
    params["embedding"]["table"] *= np.float32(1e3)
    request = Request([[1, 5]], max_new_tokens=3, sampling=sampling)
    with pytest.raises(NotFiniteError, match="logits that are not finite after prompt 1"):
        generate(tiny.MODEL, jax.device_put(params), request)


def test_an_export_whose_logits_are_not_numbers_writes_no_text() -> None:
    class Broken(Runtime):
        def _extend(self, tokens: Any) -> Any:
            return np.full((len(tokens), 300), np.nan, np.float32)

    engine = RuntimeEngine(tiny.MODEL, "float32", Broken("broken", tiny.MODEL))
    with pytest.raises(NotFiniteError, match="broken computes logits that are not finite"):
        list(engine.writer()(Request([[1]], max_new_tokens=3, sampling=GREEDY)))


def test_somebody_measures_a_model_that_diverged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diverged, text = scaled(tmp_path, 1e4), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 30)
    assert cli.main(["evaluate", f"--checkpoint={diverged}", f"--perplexity={text}"]) == 0
    result = strict_json.parse(capsys.readouterr().out)
    assert result["loss"] > 709.8 and result["perplexity"] is None
    # The harness computes perplexities too.
    evaluation = Evaluation(diverged, tmp_path / "rows", ["wikitext"])
    assert evaluation.scores("wikitext")["word_perplexity"] is None


def torch_room(model: ModelConfig) -> None:
    pytest.importorskip("mobilellm_jax.export.torch_decoder").activate(model.activation, [])


def onnx_room(model: ModelConfig) -> None:
    pytest.importorskip("mobilellm_jax.export.onnx.writer")._activated(None, "x", model)


@pytest.mark.parametrize(
    "room",
    [
        # The tests check the types of arguments, which a user's process does not do.
        lambda model: inspect.unwrap(block.activate)(model.activation, [jnp.zeros((1, 1, 1))]),
        parameter_count,
        lambda model: ffn_width(64, model.activation),
        torch_room,
        onnx_room,
    ],
)
def test_somebody_adds_an_activation_and_forgets_a_room(room: Callable[[ModelConfig], Any]) -> None:
    model = dataclasses.replace(tiny.MODEL)
    object.__setattr__(model, "activation", "relu2")
    with pytest.raises(Exception, match="relu2"):
        room(model)


@pytest.mark.parametrize(
    ("field", "room"),
    [
        ("schedule", lambda optimizer: learning_rate(optimizer, 2000)),
        ("name", lambda optimizer: make_optimizer(optimizer, 2000)),
        ("name", lambda optimizer: inspect.unwrap(application_order)(2, 2, optimizer.name)),
    ],
)
def test_other_closed_sets_of_names_have_no_silent_default(
    field: str, room: Callable[[OptimizerConfig], Any]
) -> None:
    optimizer = OptimizerConfig()
    object.__setattr__(optimizer, field, "lion")
    with pytest.raises(Exception, match="lion"):
        room(optimizer)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ModelConfig, {"activation": "SwiGLU"}, "one of swiglu, relu, gelu. Did you mean swiglu?"),
        (ModelConfig, {"activation": "tanh"}, "model.activation='tanh' must be one of"),
        (ModelConfig, {"num_heads": 3, "num_kv_heads": 2}, "choose num_kv_heads from 1, 3."),
        (ModelConfig, {"head_dim": 7}, "model.head_dim=7 must be even"),
        (ModelConfig, {"sharing": "mirror"}, "model.sharing='mirror' must be one of"),
        (ModelConfig, {"scan_unroll": 40}, "model.scan_unroll=40 must be at most"),
        (OptimizerConfig, {"schedule": "linear"}, "optimizer.schedule='linear' must be one of"),
        (DataConfig, {"boundaries": "mask"}, "data.boundaries='mask' must be one of"),
        (TrainConfig, {"global_batch": 3, "accumulation_steps": 2}, "must be a multiple of"),
        (MeshConfig, {"data": -1, "fsdp": -1}, "only one mesh axis can take what is left"),
    ],
)
def test_somebody_makes_a_config_in_a_notebook(
    kind: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        kind(**fields)
    assert message in str(error.value)


def test_the_remedies_for_a_config_in_a_notebook_are_accepted() -> None:
    assert ModelConfig(activation="swiglu").wide_matrices == ("gate", "up")
    assert ModelConfig(num_heads=3, num_kv_heads=1).num_kv_heads == 1
    assert ModelConfig(head_dim=8).head_dim == 8
