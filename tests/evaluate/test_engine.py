"""An exported model gives the same answers as its checkpoint."""

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the eval extra")

from lm_eval.api.instance import Instance

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.evaluate.engine import RuntimeEngine, jax_engine
from mobilellm_jax.evaluate.harness import HarnessModel
from mobilellm_jax.evaluate.journal import Journal
from mobilellm_jax.evaluate.perplexity import CutText, perplexity
from mobilellm_jax.model.transformer import init_params
from tests.export.jax_runtime import JaxRuntime

CONFIG = ModelConfig(
    vocab_size=290,
    embed_dim=32,
    num_blocks=2,
    num_repeats=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_seq_len=48,
    compute_dtype="float32",
    init_std=0.3,  # likelihoods differ enough that a wrong row shows
)
TEXT = "It was the best of times, it was the worst of times. " * 8
_SUMS = 1e-3  # float32 sums in another order, over up to 48 tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([TEXT] * 9, 290, tmp_path_factory.mktemp("engine") / "x.model")


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(3))


@pytest.fixture
def models(tokenizer, params):
    engines = (
        jax_engine(CONFIG, params),
        RuntimeEngine(CONFIG, "float32", JaxRuntime(CONFIG, params)),
    )
    return [
        HarnessModel(engine, tokenizer, Journal(None, {}), origin="here", show=False)
        for engine in engines
    ]


def test_scores_and_texts_are_the_same(models) -> None:
    contexts = ["It was", "It was the best of times", "", TEXT]
    pairs = [(context, ending) for context in contexts for ending in (" times", " the worst of")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    checkpoint, artifact = (model.loglikelihood(asked) for model in models)
    np.testing.assert_allclose(artifact, checkpoint, atol=_SUMS)
    assert [greedy for _, greedy in artifact] == [greedy for _, greedy in checkpoint]

    texts = [(context, {"max_gen_toks": 9, "until": ["\n"]}) for context in contexts[:3]]
    asked = [Instance("generate_until", {}, text, i) for i, text in enumerate(texts)]
    checkpoint, artifact = (model.generate_until(asked) for model in models)
    assert artifact == checkpoint and any(artifact)


def test_a_sampled_text_is_refused(models) -> None:
    how = {"max_gen_toks": 4, "do_sample": True, "temperature": 0.7}
    with pytest.raises(ValueError, match="asks for sampled texts"):
        models[1].generate_until([Instance("generate_until", {}, ("It was", how), 0)])


@pytest.mark.parametrize("stride", [None, 16])
def test_perplexity_is_the_same(tokenizer, params, stride: int | None) -> None:
    text = CutText.cut(tokenizer, TEXT, CONFIG.max_seq_len, stride)
    expected = perplexity(jax_engine(CONFIG, params), text)
    found = perplexity(RuntimeEngine(CONFIG, "float32", JaxRuntime(CONFIG, params)), text)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (found.tokens, found.windows) == (expected.tokens, expected.windows)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)
