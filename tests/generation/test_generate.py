import dataclasses
import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.generation import generate as generate_module
from mobilellm_jax.generation.generate import Request, generate, stream
from mobilellm_jax.generation.sampling import GREEDY, Sampling
from mobilellm_jax.model.cache import KVCache, init_cache
from mobilellm_jax.model.decoding import decoding_weights
from mobilellm_jax.model.transformer import Params, Transformer, param_shapes
from tests import tiny
from tests.generation.test_sampling import naive_support
from tests.huggingface import write_huggingface

torch.set_num_threads(1)  # the thread pools of torch and jax would wait for each other
TINY = ModelConfig(
    vocab_size=300,
    embed_dim=32,
    num_blocks=2,
    num_repeats=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_seq_len=128,
    compute_dtype="float32",
)
SHARINGS = [("immediate", 2), ("repeat_all", 2), ("reverse", 3)]
# Both sides are float32 and sum at most 128 products per logit in another order.
LOGIT_TOLERANCE = 2e-5
PLAIN = Sampling(temperature=1.0, top_p=1.0)


def joined(parts: Iterable[list[list[int]]]) -> list[list[int]]:
    """Joins the parts of every row."""
    return [list(itertools.chain(*row)) for row in zip(*parts, strict=True)]


def lively_params(config: ModelConfig) -> Params:
    """Returns large weights, so that the next token depends on the whole context."""
    shapes = param_shapes(config)
    rng = np.random.default_rng(0)

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        # With a larger table, a tied head would repeat the last token.
        deviation = 0.05 if path[-1].key == "table" else 0.3
        return (deviation * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


@functools.partial(jax.jit, static_argnames="config")
def full_forward(params: Params, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    return Transformer(config).apply({"params": params}, tokens_BT)


def next_logits(params: Params, ids: list[int], config: ModelConfig = TINY) -> np.ndarray:
    padded_1T = np.zeros((1, config.max_seq_len), np.int32)
    padded_1T[0, : len(ids)] = ids  # a causal model ignores the padding after the tokens
    return np.asarray(full_forward(params, padded_1T, config))[0, len(ids) - 1]


def naive_greedy(params: Params, prompt: list[int], count: int, config: ModelConfig) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(next_logits(params, ids, config))))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def params() -> Params:
    return lively_params(TINY)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer_of_few_words(tmp_path_factory.mktemp("sp"), 300)


@pytest.mark.parametrize(("sharing", "repeats"), SHARINGS)
def test_cached_decoding_equals_full_forward_at_every_position(sharing: str, repeats: int) -> None:
    config = dataclasses.replace(TINY, sharing=sharing, num_repeats=repeats)
    params = lively_params(config)
    length = config.max_seq_len
    tokens_1T = np.random.default_rng(0).integers(0, config.vocab_size, (1, length), np.int32)

    @jax.jit
    def cached(params: Params, tokens_1T: jax.Array) -> jax.Array:
        model = Transformer(config).bind({"params": params})

        def step(cache: KVCache, token_B: jax.Array) -> tuple[KVCache, jax.Array]:
            x_B1D, cache = model.extend(token_B[:, None], cache)
            return cache, model.logits(x_B1D)[:, 0]

        cache = init_cache(config, 1, length, jnp.float32)
        _, logits_T1V = jax.lax.scan(step, cache, tokens_1T.T)
        return logits_T1V.swapaxes(0, 1)

    expected_1TV = np.asarray(full_forward(params, tokens_1T, config))
    tolerance = LOGIT_TOLERANCE * np.abs(expected_1TV).max()
    np.testing.assert_allclose(cached(params, tokens_1T), expected_1TV, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("sharing", "repeats"), SHARINGS)
def test_greedy_equals_argmax_over_full_forwards(sharing: str, repeats: int) -> None:
    config = dataclasses.replace(TINY, sharing=sharing, num_repeats=repeats)
    params = lively_params(config)
    prompt = [1, 5, 7, 200, 31]
    [ids] = generate(config, params, Request([prompt], max_new_tokens=64, sampling=GREEDY))
    assert len(set(ids)) > 8, "weights that only repeat a token would test nothing"
    assert ids == naive_greedy(params, prompt, 64, config)


@pytest.mark.parametrize(("sharing", "repeats"), SHARINGS)
def test_greedy_equals_transformers_generate_on_the_export(
    sharing: str, repeats: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = dataclasses.replace(TINY, sharing=sharing, num_repeats=repeats)
    params = lively_params(config)
    prompt = [1, 5, 7, 200, 31]
    [ids] = generate(config, params, Request([prompt], max_new_tokens=64, sampling=GREEDY))
    write_huggingface(config, params, tokenizer, tmp_path / "hf", layout="hf")
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert llama.config.num_hidden_layers == 2 * repeats
    tokens = torch.tensor([prompt])
    theirs = llama.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert theirs[0, len(prompt) :].tolist() == ids


def test_untied_model_in_bfloat16_generates_what_the_full_forward_says() -> None:
    config = dataclasses.replace(
        TINY, num_repeats=1, tie_embeddings=False, compute_dtype="bfloat16"
    )
    params = lively_params(config)
    [ids] = generate(config, params, Request([[1, 2, 3]], max_new_tokens=12, sampling=GREEDY))
    # bfloat16 sums in another order round differently, so two likely tokens may change places.
    for n, token in enumerate(ids):
        logits_V = next_logits(params, [1, 2, 3, *ids[:n]], config)
        assert logits_V[token] >= logits_V.max() - 0.05 * np.abs(logits_V).max()


def test_batch_of_different_lengths_equals_each_alone(params: Params) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 300, n).tolist() for n in (1, 40, 3, 17, 16)]
    together = generate(TINY, params, Request(prompts, max_new_tokens=70, sampling=GREEDY))
    alone = [naive_greedy(params, prompt, 40, TINY) for prompt in prompts]
    assert len({tuple(ids) for ids in alone}) == len(prompts)
    assert [ids[:40] for ids in together] == alone


def test_prepared_parameters_generate_the_same_and_are_prepared_once(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[1, 5, 7, 200, 31], [1, 2]]
    expected = generate(TINY, params, Request(prompts, max_new_tokens=30, sampling=PLAIN))
    prepared = generate_module.prepare(TINY, params)
    monkeypatch.setattr(generate_module, "prepare", None)
    for _ in range(2):
        rows = generate(TINY, prepared, Request(prompts, max_new_tokens=30, sampling=PLAIN))
        assert rows == expected


@pytest.mark.parametrize(("dtype", "rows"), [("float32", [1, 2, 4]), ("bfloat16", [2, 2, 4])])
def test_bfloat16_on_a_cpu_never_multiplies_one_row(
    params: Params, dtype: str, rows: list[int]
) -> None:
    config = dataclasses.replace(TINY, compute_dtype=dtype)
    weights = decoding_weights(params, config)
    assert [generate_module._rows(config, weights, count) for count in (1, 2, 3)] == rows


def test_sampled_row_does_not_depend_on_its_neighbours(params: Params) -> None:
    a, b, c = [1, 20], [1, 30, 31, 32, 33], [1] * 30
    first = generate(TINY, params, Request([a, b, a], max_new_tokens=20, sampling=PLAIN))
    second = generate(TINY, params, Request([a, c, b], max_new_tokens=20, sampling=PLAIN))
    assert first[0] == second[0]
    assert first[1] != second[2]  # the draws depend on the place in the batch


def test_row_ends_before_its_eos_and_others_go_on(params: Params) -> None:
    prompts = [[1, 5, 7, 200, 31], [1, 2, 3], *([1, n] for n in range(4, 7))]
    free = generate(TINY, params, Request(prompts, max_new_tokens=100, sampling=GREEDY))
    eos = free[0][10]
    cut = [ids[: ids.index(eos)] if eos in ids else ids for ids in free]
    assert len(cut[0]) <= 10 < len(cut[1])
    stopped = generate(
        TINY, params, Request(prompts, max_new_tokens=100, sampling=GREEDY, end_ids=[eos])
    )
    assert stopped == cut
    pieces = stream(
        TINY, params, Request(prompts[:1], max_new_tokens=100, sampling=GREEDY, end_ids=[eos])
    )
    assert joined(pieces) == cut[:1]


def test_each_of_several_tokens_ends_a_row(params: Params) -> None:
    prompts = [[1, 5, 7, 200, 31], [1, 2, 3]]
    free = generate(TINY, params, Request(prompts, max_new_tokens=40, sampling=GREEDY))
    ends = [free[0][10], free[1][20]]
    cut = [ids[: min(ids.index(end) for end in ends if end in ids)] for ids in free]
    request = Request(prompts, max_new_tokens=40, sampling=GREEDY, end_ids=ends)
    assert generate(TINY, params, request) == cut
    assert joined(stream(TINY, params, request)) == cut


def test_eos_as_first_token_gives_no_tokens(params: Params) -> None:
    [[first, *_]] = generate(TINY, params, Request([[1, 2, 3]], max_new_tokens=70, sampling=GREEDY))
    request = Request([[1, 2, 3]], max_new_tokens=70, sampling=GREEDY, end_ids=[first])
    assert generate(TINY, params, request) == [[]]
    assert joined(stream(TINY, params, request)) == [[]]


def test_decoding_stops_early_when_all_rows_are_done(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [1, 5, 7, 200, 31]
    [ids] = generate(TINY, params, Request([prompt], max_new_tokens=100, sampling=GREEDY))
    calls: list[int] = []
    decode = generate_module._decode

    def counted(*args: object, **kwargs: object) -> object:
        state, new_BT = decode(*args, **kwargs)
        calls.append(int(state.drawn))
        return state, new_BT

    monkeypatch.setattr(generate_module, "_decode", counted)
    eos = ids[10]
    generate(TINY, params, Request([prompt], max_new_tokens=100, sampling=GREEDY, end_ids=[eos]))
    assert calls == [ids.index(eos) + 1]


def test_stream_of_a_batch_equals_generate_and_computes_what_is_asked_for(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[1, 5, 7, 200, 31], [1, 2, 3], [1, 4]]
    endless = Request(prompts, max_new_tokens=60, sampling=GREEDY)
    eos = generate(TINY, params, endless)[0][12]
    request = dataclasses.replace(endless, end_ids=[eos])
    whole = generate(TINY, params, request)
    assert len(whole[0]) <= 12 < max(map(len, whole))
    parts = list(stream(TINY, params, request))
    assert joined(parts) == whole
    assert len(parts) > 3
    some = list(itertools.islice(stream(TINY, params, endless), 2))
    monkeypatch.setattr(generate_module, "_decode", None)
    first = stream(TINY, params, endless)
    assert next(first) == some[0]  # the prefill draws this token
    with pytest.raises(TypeError):
        next(first)


def test_stream_of_any_length_equals_generate(params: Params) -> None:
    prompt = [1] * 62
    for count in (3, 8, 9, 10, 65, 66):
        request = Request([prompt], max_new_tokens=count, sampling=PLAIN)
        whole = generate(TINY, params, request)
        pieces = list(stream(TINY, params, request))
        assert joined(pieces) == whole
        assert len(whole[0]) == count
        assert len(pieces) == 1 + -(-(count - 1) // 8)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 7, 1.0), (1.5, 0, 0.8), (1.3, 20, 0.7)],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    config = dataclasses.replace(TINY, vocab_size=40, num_blocks=1, num_repeats=1)
    params = lively_params(config)
    rows, prompt = 1024, [1, 5, 9]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
    drawn = generate(config, params, Request([prompt] * rows, max_new_tokens=1, sampling=sampling))
    counts_V = np.bincount(np.ravel(drawn), minlength=40)

    scaled_V = next_logits(params, prompt, config).astype(np.float64) / temperature
    support = sorted(naive_support(scaled_V, top_k, top_p))
    expected_V = np.zeros(40)
    expected_V[support] = np.exp(scaled_V[support] - scaled_V.max())
    expected_V *= rows / expected_V.sum()
    assert counts_V.sum() == rows
    assert set(np.flatnonzero(counts_V)) <= set(support)
    # The chi-square test has a cell for each token with at least 5 expected draws, and one for the
    # other tokens.
    large = expected_V >= 5
    observed = np.append(counts_V[large], counts_V[~large].sum())
    expected = np.append(expected_V[large], expected_V[~large].sum() + 1e-9)
    statistic = float(((observed - expected) ** 2 / np.maximum(expected, 1)).sum())
    degrees = int(large.sum())
    assert degrees >= 4
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)  # mean + 4 standard deviations


def test_every_step_row_and_seed_draws_anew(params: Params) -> None:
    uniform = jax.tree.map(jnp.zeros_like, params)
    draws_SBT = np.array(
        [
            generate(
                TINY,
                uniform,
                Request(
                    [[1]] * 4, max_new_tokens=60, sampling=dataclasses.replace(PLAIN, seed=seed)
                ),
            )
            for seed in range(20)
        ]
    )
    expected = draws_SBT.size / 300
    counts_V = np.bincount(draws_SBT.ravel(), minlength=300)
    statistic = float(((counts_V - expected) ** 2 / expected).sum())
    assert abs(statistic - 299) < 4 * np.sqrt(2 * 299)
    for axis in range(3):
        neighbours = np.delete(draws_SBT, 0, axis) == np.delete(draws_SBT, -1, axis)
        deviation = np.sqrt(1 / 300 / neighbours.size)
        assert abs(neighbours.mean() - 1 / 300) < 4.5 * deviation


def test_same_seed_same_tokens_other_seed_others(params: Params) -> None:
    def draw(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=seed)
        return generate(TINY, params, Request([[1, 2]] * 3, max_new_tokens=30, sampling=sampling))

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(7)[0] != draw(7)[1]
    assert draw(2**32 - 1) != draw(7)


def test_lowest_temperature_and_top_k_1_are_greedy(params: Params) -> None:
    def first(sampling: Sampling) -> list[list[int]]:
        return generate(TINY, params, Request([[1, 4]], max_new_tokens=70, sampling=sampling))

    greedy = first(GREEDY)
    assert first(Sampling(temperature=1e-30)) == greedy
    assert first(Sampling(temperature=5.0, top_k=1, top_p=1.0)) == greedy
    assert first(Sampling(temperature=5.0, top_p=1e-50)) == greedy
    assert first(Sampling(temperature=0.0, top_p=0.5)) == greedy
    assert first(Sampling(temperature=1.0, top_p=0.99)) != greedy


def test_other_lengths_and_settings_compile_nothing_new(params: Params) -> None:
    def run(length: int, new: int, **settings: float) -> None:
        sampling = Sampling(**settings)  # type: ignore[arg-type]  # numbers of both kinds
        generate(TINY, params, Request([[1] * length], max_new_tokens=new, sampling=sampling))

    def programs() -> tuple[int, int]:
        return generate_module._prefill._cache_size(), generate_module._decode._cache_size()

    run(2, 63)
    before = programs()
    run(1, 120, temperature=0.3, seed=5)
    run(50, 40, top_k=4)
    run(64, 64, top_p=0.2)
    assert programs() == before


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1] * 100], 29, r"100 tokens.*max_new_tokens=29.*max_seq_len=128.*at most 28 new"),
        ([[1], [1] * 128], 1, r"128 tokens.*max_new_tokens=1 .*max_seq_len=128; shorten the"),
        ([[1]], 0, r"max_new_tokens=0 must be at least 1"),
        ([[1], []], 5, r"start it with BOS"),
    ],
)
def test_requests_that_do_not_fit_are_refused(
    prompts: list[list[int]], new: int, message: str, params: Params
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(TINY, params, Request(prompts, max_new_tokens=new))


def test_longest_request_that_fits_is_served(params: Params) -> None:
    prompt = [1] + [5] * 99
    [ids] = generate(TINY, params, Request([prompt], max_new_tokens=28, sampling=GREEDY))
    assert ids == naive_greedy(params, prompt, 28, TINY)


def test_no_prompts_give_no_rows(params: Params) -> None:
    assert generate(TINY, params, Request([], max_new_tokens=5)) == []
