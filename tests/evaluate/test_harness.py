"""Our model answers like the harness' `hf` model with the same weights."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# transformers and datasets read this once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the eval extra")

import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mobilellm_jax.config import MeshConfig, ModelConfig
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.evaluate.engine import Continuations, Engine, JaxEngine, Writer, jax_engine
from mobilellm_jax.evaluate.harness import HarnessModel
from mobilellm_jax.evaluate.journal import Journal
from mobilellm_jax.evaluate.prefix_trees import Query
from mobilellm_jax.evaluate.scoring import Score, Scorer
from mobilellm_jax.generation.generate import Request
from mobilellm_jax.model.transformer import Params, init_params
from mobilellm_jax.sharding import logical_rules, make_mesh, replicated
from tests.huggingface import write_huggingface

torch.set_num_threads(1)
VOCAB = 320
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    embed_dim=32,
    num_blocks=2,
    num_repeats=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_seq_len=96,
    init_std=0.15,  # so that the likelihoods differ
    compute_dtype="float32",
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Question: Which is it?\nAnswer: this one\n\nQuestion: What is red?\nAnswer: the wall.",
    "It was the best of times, it was the worst of times; stra\u00dfe, na\u00efve, \u65e5\u672c.",
] * 3
CLOSE = 1e-3  # float32 sums over up to 96 tokens; the largest difference so far was 2e-5


class Pair(NamedTuple):
    """The same model in both implementations."""

    ours: HarnessModel
    theirs: Any


def sentencepiece(folder: Path) -> Tokenizer:
    return train_tokenizer(TEXTS, VOCAB, folder / "tokenizer.model")


def byte_level(folder: Path) -> Tokenizer:
    """Returns a tokenizer like GPT-2's, which puts no token before a text."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    model.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def params() -> Params:
    params = init_params(CONFIG, jax.random.key(0))
    # The head is tied, so a strong embedding makes the model repeat its token, and some requests
    # are greedy. Byte tokens have weak embeddings, because broken texts of `hf` vary by batch.
    scale_V = np.where(np.arange(VOCAB) < 260, 0.1, 6.0).astype(np.float32)
    table_VD = params["embedding"]["table"] * scale_V[:, None]
    return {**params, "embedding": {"table": table_VD}}


@pytest.fixture(scope="module", params=[sentencepiece, byte_level], ids=lambda make: make.__name__)
def pair(
    request: pytest.FixtureRequest, params: Params, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = request.param(folder)
    write_huggingface(CONFIG, params, tokenizer, folder / "hf")
    theirs = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=4)
    return Pair(make_model(params, tokenizer), theirs)


def make_model(params: Params, tokenizer: Tokenizer, config: ModelConfig = CONFIG) -> HarnessModel:
    engine = jax_engine(config, params)
    return HarnessModel(engine, tokenizer, Journal(None, {}), origin="here", show=False)


def instances(kind: str, asked: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(asked)]


def likelihood_requests() -> list[tuple[str, str]]:
    context = "Question: What is red?\nAnswer:"
    long = "The quick brown fox jumps over the lazy dog, and " * 12
    return [
        *((context, ending) for ending in (" the wall.", " this one", " the", ":")),
        ("the the the the", " the the"),
        ("", " the dog does not mind."),
        ("", "the dog"),
        ("The dog  ", "does"),  # the spaces move to the continuation
        ("It was the best of ", " times"),
        ("T", "he quick brown fox"),  # the border cuts a word
        ("Is", " it the worst of times; or the best of times, or the lazy dog?"),  # a short context
        (long, " the dog."),  # longer than the model reads
        (long[:200], long[200:260]),
        ("stra\u00dfe \u65e5", "\u672c \N{GRINNING FACE} na\u00efve"),
        ("The quick brown fox", " jumps"),
        ("The quick brown dog", " jumps"),
    ]


def test_token_ids_and_likelihoods_equal_hf(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = likelihood_requests()
    ids: list[list[Any]] = []
    for model in pair:
        inner = model._loglikelihood_tokens

        def note(requests: Any, inner: Any = inner, **settings: Any) -> Any:
            ids.append([(list(c), list(t)) for _, c, t in requests])
            return inner(requests, **settings)

        monkeypatch.setattr(model, "_loglikelihood_tokens", note)
    ours, theirs = (model.loglikelihood(instances("loglikelihood", asked)) for model in pair)
    assert ids[0] == ids[1]
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    if pair.ours.tok_encode(""):  # without BOS the model repeats nothing
        assert 0 < sum(greedy for _, greedy in ours) < len(asked)
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], atol=CLOSE, rtol=0)
    assert pair.ours.cut >= 1


def test_likelihoods_of_whole_texts_equal_hf(pair: Pair) -> None:
    texts = ["the dog", "The quick brown fox jumps. " * 40, TEXTS[2]]
    ours, theirs = (
        model.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))
        for model in pair
    )
    # The long text is a sum over 11 windows.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_written_texts_equal_hf(pair: Pair) -> None:
    stop_at_line = {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 24}
    to_the_end = {"until": [], "do_sample": False, "max_gen_toks": 40}
    prompts = ["Question: What is red?\nAnswer:", "The dog", "fox " * 60, "It was", "\u65e5"]
    asked = [(prompt, how) for how in (stop_at_line, to_the_end) for prompt in prompts]
    # This stop string occurs in the middle of the model's text.
    [whole] = pair.ours.generate_until(instances("generate_until", [("The", to_the_end)]))
    asked.append(("The", {**to_the_end, "until": [whole[5:8]]}))
    ours, theirs = (model.generate_until(instances("generate_until", asked)) for model in pair)
    assert ours == theirs
    assert ours[-1] == whole.split(whole[5:8])[0]
    assert len(set(ours)) > 3


def test_a_continuation_longer_than_the_model_is_refused_as_hf_does(pair: Pair) -> None:
    [request] = instances("loglikelihood", [("The", " quick brown fox" * 60)])
    with pytest.raises(ValueError, match="longer than model.max_seq_len=96"):
        pair.ours.loglikelihood([request])
    with pytest.raises(AssertionError):
        pair.theirs.loglikelihood([request])


def test_texts_that_are_too_long_are_refused(params: Params, tmp_path: Path) -> None:
    model = make_model(params, sentencepiece(tmp_path))
    asked = instances("generate_until", [("The", {"max_gen_toks": 96})])
    with pytest.raises(ValueError, match="up to 96 tokens, which must be less than model.max_seq"):
        model.generate_until(asked)
    # The default of 256 tokens does not fit here, so half of the length is used.
    [text] = model.generate_until(instances("generate_until", [("The", {})]))
    [longest] = model.generate_until(instances("generate_until", [("The", {"max_gen_toks": 48})]))
    assert text == longest
    with pytest.raises(ValueError, match="asks for texts with num_beams=2"):
        model.generate_until(instances("generate_until", [("The", {"num_beams": 2})]))


class Interrupted:
    """An engine that counts requests, and is interrupted after one batch if `until_killed`."""

    def __init__(self, engine: JaxEngine, until_killed: bool) -> None:
        self.config, self.precision = engine.config, engine.precision
        self.prompts_at_once = 4
        self.asked = self.answered = 0
        self._engine, self._until_killed = engine, until_killed

    def _answering(self, count: int) -> None:
        if self._until_killed and self.answered:
            raise KeyboardInterrupt
        self.answered += count

    def scores(self, queries: Sequence[Query]) -> Iterator[list[tuple[int, Score]]]:
        self.asked += len(queries)
        for batch in self._engine.scores(queries):
            self._answering(len(batch))
            yield batch

    def writer(self) -> Writer:
        write = self._engine.writer()

        def counted(request: Request) -> Continuations:
            self._answering(len(request.prompts))
            return write(request)

        return counted


def test_answers_from_before_a_kill_are_not_asked_again(params: Params, tmp_path: Path) -> None:
    tokenizer, path = sentencepiece(tmp_path), tmp_path / "journal"
    mesh = make_mesh(MeshConfig())
    scorer = Scorer(CONFIG, mesh, logical_rules(CONFIG, mesh.shape), batch_tokens=256)
    engine = JaxEngine(scorer, jax.device_put(params, replicated(mesh)))

    def model(engine: Engine) -> HarnessModel:
        journal = Journal(path if isinstance(engine, Interrupted) else None, {"weights": "these"})
        return HarnessModel(engine, tokenizer, journal, origin="here", show=False)

    # One row of 256 places per device and batch makes several batches.
    contexts = [f"{i} was the {'best ' * (i % 20)} of times" for i in range(120)]
    asked = instances("loglikelihood", [(context, " and") for context in contexts])
    prompts = instances("generate_until", [(c, {"max_gen_toks": 4}) for c in contexts[:10]])
    whole = model(engine)
    expected = whole.loglikelihood(asked), whole.generate_until(prompts)

    killed = Interrupted(engine, until_killed=True)
    with pytest.raises(KeyboardInterrupt):
        model(killed).loglikelihood(asked)
    assert 0 < killed.answered < len(asked)
    again = Interrupted(engine, until_killed=False)
    # The rows are packed differently, so float32 sums may have another order.
    np.testing.assert_allclose(model(again).loglikelihood(asked), expected[0], atol=1e-4)
    assert again.asked == len(asked) - killed.answered

    killed = Interrupted(engine, until_killed=True)
    with pytest.raises(KeyboardInterrupt):
        model(killed).generate_until(prompts)
    assert 0 < killed.answered < len(prompts)
    again = Interrupted(engine, until_killed=False)
    assert model(again).generate_until(prompts) == expected[1]
    assert again.answered == len(prompts) - killed.answered


def test_the_record_names_model_and_precision(params: Params, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    info = make_model(params, sentencepiece(tmp_path), config).get_model_info()
    assert info["model"] == "here" and info["model_dtype"] == "bfloat16"
