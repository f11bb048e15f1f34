"""Scores of a sharded model in training equal the scores of the whole model."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from mobilellm_jax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
)
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.engine import jax_engine
from mobilellm_jax.evaluate.in_training import make_evaluator
from mobilellm_jax.evaluate.journal import Journal
from mobilellm_jax.evaluate.perplexity import CutText, perplexity
from mobilellm_jax.sharding import logical_rules, make_mesh
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import init_state
from tests.evaluate.example_rows import write_rows

CONFIG = Config(
    model=ModelConfig(
        vocab_size=304,
        embed_dim=16,
        num_blocks=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=24,
        max_seq_len=64,
        init_std=0.3,
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=64),
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
)
TEXT = "the cat sat on the mat and the dog ran to the cat\n" * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([TEXT], 304, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def evaluating(**fields: Any) -> Config:
    return dataclasses.replace(CONFIG, evaluate=EvaluateConfig(every=1, **fields))


def test_tasks_and_text_on_sharded_parameters(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra")
    from mobilellm_jax.evaluate.harness import HarnessModel
    from mobilellm_jax.evaluate.tasks import load_tasks, run_tasks

    write_rows(tmp_path / "evals")
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    names = ["piqa", "triviaqa"]
    chosen = {"tasks": "piqa, triviaqa", "data_dir": str(tmp_path / "evals"), "limit": 2}
    config = evaluating(text=str(file), **chosen)
    mesh = make_mesh(config.mesh)
    rules = logical_rules(config.model, mesh.shape)
    evaluate = make_evaluator(config, tokenizer, mesh, rules)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    params = init_state(config, optimizer, mesh, rules).params
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    found = evaluate(params)

    engine = jax_engine(config.model, jax.device_get(params), jax.devices()[:1])
    model = HarnessModel(engine, tokenizer, Journal(None, {}), origin="here", show=False)
    tasks = load_tasks(names, data_dir=tmp_path / "evals")
    results = run_tasks(model, tasks, 2)["results"]
    expected = perplexity(engine, CutText.cut(tokenizer, TEXT, 64, stride=64))
    assert found == pytest.approx(
        {
            "evaluate/piqa/acc": results["piqa"]["acc,none"],
            "evaluate/piqa/acc_norm": results["piqa"]["acc_norm,none"],
            "evaluate/triviaqa/exact_match": 0.0,
            "evaluate/triviaqa/f1": results["triviaqa"]["f1,remove_whitespace"],
            "evaluate/text/loss": expected.loss,
            "evaluate/text/perplexity": expected.perplexity,
            "evaluate/text/bits_per_byte": expected.bits_per_byte,
        },
        rel=1e-5,  # float32 sums in another order
    )
    # Other parameters give other answers, because no answer is kept.
    other = evaluate(jax.tree.map(lambda leaf: leaf * 0.5, params))
    assert other["evaluate/text/loss"] != found["evaluate/text/loss"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "no/such/file"}, "evaluate.text=no/such/file does not exist; name a text file"),
        ({"text": "latin.txt"}, "evaluate.text=latin.txt must be UTF-8, but byte 3 is 0xe9"),
        ({"text": "empty.txt"}, "evaluate.text=empty.txt is empty"),
        ({"tasks": "pica", "data_dir": "."}, "Did you mean piqa"),
    ],
)
def test_mistakes_are_reported_before_the_run(
    fields: dict[str, str],
    message: str,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "tasks" in fields:
        pytest.importorskip("lm_eval", reason="the eval extra")
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("empty.txt").touch()
    config = evaluating(**fields)
    mesh = make_mesh(config.mesh)
    with pytest.raises(ValueError, match=message):
        make_evaluator(config, tokenizer, mesh, logical_rules(config.model, mesh.shape))


def test_tasks_without_the_harness(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    mesh = make_mesh(CONFIG.mesh)
    rules = logical_rules(CONFIG.model, mesh.shape)
    with pytest.raises(UserError, match=r"pip install 'mobilellm-jax\[eval\]'"):
        make_evaluator(evaluating(tasks="piqa"), tokenizer, mesh, rules)
