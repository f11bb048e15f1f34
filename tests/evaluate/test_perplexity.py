import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.evaluate.engine import JaxEngine, jax_engine
from mobilellm_jax.evaluate.perplexity import CutText, PerplexityResult, perplexity
from mobilellm_jax.model.transformer import Params, Transformer, param_shapes
from tests.huggingface import write_huggingface

torch.set_num_threads(1)  # the threads of torch and jax would wait for each other
TINY = ModelConfig(
    vocab_size=300,
    embed_dim=32,
    num_blocks=2,
    num_repeats=2,
    sharing="reverse",
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_seq_len=32,
    compute_dtype="float32",
)
# Characters of one to four bytes, repeated spaces, and "<s>" as plain text; 10 windows and a rest.
TEXT = "the cat  sat on the mat, na\u00efve \u2581 \u65e5\u672c \U0001f600\n<s>\tthe dog\r\n" * 8
# Two implementations of a float32 log-softmax over 300 tokens differ by this much.
LOSS_TOLERANCE = 2e-6


@functools.cache
def params_of(config: ModelConfig) -> Params:
    shapes = param_shapes(config)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = "the cat sat on the mat and the dog ran to the cat\n" * 20
    return train_tokenizer([text], 300, tmp_path_factory.mktemp("sp") / "tokenizer.model")


@functools.cache
def engine_of(config: ModelConfig) -> JaxEngine:
    return jax_engine(config, params_of(config), jax.devices()[:1])


def measure(
    config: ModelConfig, tokenizer: Tokenizer, text: str, stride: int | None = None
) -> PerplexityResult:
    cut = CutText.cut(tokenizer, text, config.max_seq_len, stride)
    return perplexity(engine_of(config), cut)


@pytest.fixture(scope="module")
def result(tokenizer: Tokenizer) -> PerplexityResult:
    return measure(TINY, tokenizer, TEXT)


def windows(tokenizer: Tokenizer, text: str, length: int = TINY.max_seq_len) -> np.ndarray:
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    cut = [ids[i : i + length] for i in range(0, len(ids), length)]
    return np.array([window for window in cut if len(window) == length])


def piece_bytes(tokenizer: Tokenizer) -> list[int]:
    """Returns the bytes of each token, from the pieces that SentencePiece lists."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.file))
    return [
        1
        if model.is_byte(i)
        else 0
        if model.is_control(i)
        else len(model.id_to_piece(i).replace("\u2581", " ").encode())
        for i in range(tokenizer.vocab_size)
    ]


def test_loss_equals_the_papers_loop_over_huggingface_llama(
    result: PerplexityResult, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_huggingface(TINY, params_of(TINY), tokenizer, tmp_path / "hf", layout="hf")
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert llama.config.num_hidden_layers == 4
    losses = []
    for window in windows(tokenizer, TEXT):
        tokens = torch.tensor(window[None])
        with torch.no_grad():
            losses.append(llama(tokens, labels=tokens).loss.double().item())
    assert result.windows == len(losses) >= 10
    assert result.loss == pytest.approx(np.mean(losses), abs=LOSS_TOLERANCE)
    assert result.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=LOSS_TOLERANCE)
    assert result.loss > math.log(300)  # a uniform model has log(300)


def test_loss_equals_float64_log_softmax_of_the_logits(
    result: PerplexityResult, tokenizer: Tokenizer
) -> None:
    tokens_WT = windows(tokenizer, TEXT)
    forward = jax.jit(lambda p, t: Transformer(TINY).apply({"params": p}, t))
    logits_WTV = np.asarray(forward(params_of(TINY), tokens_WT), np.float64)[:, :-1]
    log_sum_WT = np.log(np.exp(logits_WTV).sum(-1))
    target_WT = np.take_along_axis(logits_WTV, tokens_WT[:, 1:, None], -1)[..., 0]
    assert result.loss == pytest.approx((log_sum_WT - target_WT).mean(), abs=LOSS_TOLERANCE)
    assert result.tokens == target_WT.size == result.windows * 31


def test_bits_per_byte_counts_the_bytes_of_the_scored_tokens(
    result: PerplexityResult, tokenizer: Tokenizer
) -> None:
    sizes = piece_bytes(tokenizer)
    ids = tokenizer.encode(TEXT)
    assert (
        sum(sizes[i] for i in ids) == len(TEXT.encode()) + 1
    )  # SentencePiece adds a space before the first word
    firsts = windows(tokenizer, TEXT)[1:, 0]
    assert any(sizes[i] > 1 for i in firsts) and any(sizes[i] == 1 and i < 259 for i in firsts)
    scored = sum(sizes[i] for i in windows(tokenizer, TEXT)[:, 1:].ravel()) - 1
    assert scored < len(TEXT.encode()) - 20
    bits = result.loss * result.tokens / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits / scored, rel=1e-12)


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_bytes_are_exact_wherever_the_text_ends(cut: int, tokenizer: Tokenizer) -> None:
    text = TEXT[: len(TEXT) - cut]
    config = dataclasses.replace(TINY, max_seq_len=9)
    result = measure(config, tokenizer, text)
    sizes = piece_bytes(tokenizer)
    scored = sum(sizes[i] for i in windows(tokenizer, text, 9)[:, 1:].ravel()) - 1
    bits = result.loss * result.tokens / math.log(2)
    assert round(bits / result.bits_per_byte, 6) == scored


def test_last_partial_window_is_dropped(tokenizer: Tokenizer, result: PerplexityResult) -> None:
    rest = 1 + len(tokenizer.encode(TEXT)) - 32 * result.windows
    assert 0 < rest < 32
    longer = measure(TINY, tokenizer, TEXT + "\x01" * (31 - rest))
    assert (longer.loss, longer.tokens) == (result.loss, result.tokens)
    assert longer.bits_per_byte == result.bits_per_byte
    more = measure(TINY, tokenizer, TEXT + "\x01" * (32 - rest))
    assert more.windows == result.windows + 1
    assert more.loss != result.loss


def test_a_long_text_is_scored_in_parts(
    result: PerplexityResult, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilellm_jax.evaluate.perplexity._WINDOWS_AT_ONCE", 4)
    assert result.windows % 4 != 0  # the last part is shorter
    other = measure(TINY, tokenizer, TEXT)
    assert other.loss == pytest.approx(result.loss, abs=LOSS_TOLERANCE)
    assert (other.tokens, other.windows) == (result.tokens, result.windows)


def test_the_perplexity_of_a_uniform_model_is_the_size_of_the_vocabulary(
    tokenizer: Tokenizer,
) -> None:
    nothing = jax.tree.map(np.zeros_like, params_of(TINY))
    engine = jax_engine(TINY, nothing, jax.devices()[:1])
    result = perplexity(engine, CutText.cut(tokenizer, TEXT, TINY.max_seq_len, None))
    assert result.loss == pytest.approx(math.log(300), abs=1e-6)
    assert result.perplexity == pytest.approx(300, rel=1e-6)


def test_text_of_exactly_one_window_is_scored_and_a_shorter_one_too(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    one, short = "z" * 30, "z" * 29  # each z is one token, and a space stands before them
    assert [len(tokenizer.encode(text)) for text in (one, short)] == [31, 30]
    assert (measure(TINY, tokenizer, one).tokens, measure(TINY, tokenizer, one).windows) == (31, 1)
    found = measure(TINY, tokenizer, short)
    assert (found.tokens, found.windows) == (30, 1)
    write_huggingface(TINY, params_of(TINY), tokenizer, tmp_path / "hf")
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(short)]])
    with torch.no_grad():
        expected = llama_of(tmp_path / "hf")(ids, labels=ids).loss.item()
    assert found.loss == pytest.approx(expected, abs=LOSS_TOLERANCE)
    with pytest.raises(ValueError, match="has no token to score"):
        measure(TINY, tokenizer, "")


@functools.cache
def llama_of(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("stride", [1, 5, 31, 32])
def test_with_a_stride_every_token_is_scored_once_by_huggingface_llama_too(
    stride: int, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "strided"
    if not folder.exists():
        write_huggingface(TINY, params_of(TINY), tokenizer, folder, layout="hf")
    text = TEXT[:150]
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)])
    losses = []
    # Token i is scored in the window that ends at the same token as its stride.
    for i in range(1, len(ids)):
        end = 32 if i <= 32 else min(32 + -(-(i - 32) // stride) * stride, len(ids) - 1)
        start = max(0, end - 32)
        with torch.no_grad():
            logits = llama_of(folder)(ids[None, start:i]).logits[0, -1].double()
        losses.append(-torch.log_softmax(logits, -1)[ids[i]].item())
    found = measure(TINY, tokenizer, text, stride=stride)
    assert found.tokens == len(ids) - 1 > 64
    assert found.windows == 1 + -(-(found.tokens - 32) // stride)
    assert found.loss == pytest.approx(np.mean(losses), abs=LOSS_TOLERANCE)
    bits = sum(losses) / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / len(text.encode()), rel=LOSS_TOLERANCE)


def test_a_stride_accepts_a_short_text(tokenizer: Tokenizer) -> None:
    found = measure(TINY, tokenizer, "zz", stride=8)
    assert (found.tokens, found.windows) == (len(tokenizer.encode("zz")), 1)
    with pytest.raises(ValueError, match="has no token to score"):
        measure(TINY, tokenizer, "", stride=8)
    for stride in (0, 33):
        with pytest.raises(ValueError, match=rf"--stride={stride} must be .* at most 32"):
            measure(TINY, tokenizer, TEXT, stride=stride)


def test_windows_of_one_token_are_refused(tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(TINY, max_seq_len=1)
    with pytest.raises(ValueError, match=r"max_seq_len=1 must be at least 2"):
        measure(config, tokenizer, TEXT)


def test_parameters_that_are_not_numbers_fail(tokenizer: Tokenizer) -> None:
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params_of(TINY))
    with pytest.raises(FloatingPointError, match="not finite"):
        perplexity(
            jax_engine(TINY, broken, jax.devices()[:1]),
            CutText.cut(tokenizer, TEXT, TINY.max_seq_len, None),
        )


def test_byte_level_tokenizer_counts_the_same_bytes(tmp_path: Path) -> None:
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(
        {p: i for i, p in enumerate(["<s>", "</s>", *alphabet, "\u0120t"])}, [("\u0120", "t")]
    )
    built = tokenizers.Tokenizer(model)
    built.add_special_tokens(["<s>", "</s>"])
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    result = measure(TINY, tokenizer, TEXT)
    # One piece has two bytes, and all other pieces have one byte.
    pairs = int((windows(tokenizer, TEXT)[:, 1:] == tokenizer.vocab_size - 1).sum())
    assert pairs > 5
    bits = result.loss * result.tokens / math.log(2)
    assert round(bits / result.bits_per_byte, 6) == result.tokens + pairs
