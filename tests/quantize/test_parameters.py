"""Quantized models: their matrices, sharing, decoding, meshes and bytes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mobilellm_jax.config import MeshConfig, ModelConfig
from mobilellm_jax.generation.generate import Request, generate, prepare
from mobilellm_jax.generation.sampling import GREEDY
from mobilellm_jax.model.decoding import decoding_weights
from mobilellm_jax.model.transformer import Params, Transformer, init_boxed, init_params
from mobilellm_jax.quantize.attention import QuantizedAttention
from mobilellm_jax.quantize.kernels import QuantizedKernel, dequantized
from mobilellm_jax.quantize.parameters import (
    NUM_INPUTS,
    bits_per_weight,
    on_levels,
    quantized,
    stored_bytes,
)
from mobilellm_jax.quantize.schemes import find_scheme
from mobilellm_jax.sharding import logical_rules, make_mesh, use

TINY = ModelConfig(
    vocab_size=64,
    embed_dim=32,
    num_blocks=2,
    num_repeats=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_seq_len=64,
    init_std=0.3,  # large, so that every matrix changes the logits
    compute_dtype="float32",
)
EVERYTHING = "embedding,head,attention,cache"
# The two sides compute float32 sums in another order, so a number at the border of two levels may
# round to either. One term of dozens then changes by a step of 1/127, and later layers pass the
# change on. The other tokens are the same.
BORDER, SAME = 0.03, 1e-5


@functools.cache
def params_of(tie_embeddings: bool = True) -> Params:
    config = dataclasses.replace(TINY, tie_embeddings=tie_embeddings)
    return init_params(config, jax.random.key(0))


@functools.partial(jax.jit, static_argnames="config")
def logits(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return Transformer(config).apply({"params": params}, tokens_BT)


def tokens(batch: int = 2, length: int = 12) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, length), 0, TINY.vocab_size)


def floats_of(params: Params) -> Params:
    """Returns the float parameters value * scale."""

    def stacked(name: str, kernel: QuantizedKernel) -> jax.Array:
        return jax.vmap(lambda k: dequantized(k, num_inputs=NUM_INPUTS[name]))(kernel)

    blocks = dict(params["blocks"])
    for part in ("attention", "feed_forward"):
        blocks[part] = {
            name: stacked(name, kernel)
            for name, kernel in blocks[part].items()
            if isinstance(kernel, QuantizedKernel)
        }
    floats = {**params, "blocks": blocks}
    if isinstance(params["embedding"]["table"], QuantizedKernel):
        floats["embedding"] = {"table": dequantized(params["embedding"]["table"].T, num_inputs=1).T}
    if "head" in params:
        floats["head"] = {"kernel": dequantized(params["head"]["kernel"], num_inputs=1)}
    return floats


def assert_same_but_for_borders(found: jax.Array, expected: jax.Array) -> None:
    found, expected = map(np.asarray, (found, expected))
    off = np.abs(found - expected).max(-1) / np.abs(expected).max()
    assert np.median(off) < SAME
    assert off.max() < BORDER


def relative(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


@pytest.mark.parametrize("sharing", ["immediate", "repeat_all", "reverse"])
def test_weights_alone_are_a_float_model_of_what_they_stand_for(sharing: str) -> None:
    config = dataclasses.replace(TINY, sharing=sharing)
    params = quantized(params_of(), find_scheme("w4g32"))
    found = logits(config, params, tokens())
    # Both sides sum the same numbers.
    assert relative(found, logits(config, floats_of(params), tokens())) < 1e-5
    assert relative(found, logits(config, params_of(), tokens())) > 1e-2


@pytest.mark.parametrize(
    ("name", "tie_embeddings"),
    [
        *(("w8a8", True), ("w4a8", False)),
        pytest.param("w8a8", False, marks=pytest.mark.soak),
        pytest.param("w4a8", True, marks=pytest.mark.soak),
    ],
)
def test_trained_model_is_the_integer_one(name: str, tie_embeddings: bool) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tie_embeddings)
    scheme = find_scheme(name)
    integers = logits(config, quantized(params_of(tie_embeddings), scheme), tokens())
    trained = logits(config, on_levels(params_of(tie_embeddings), scheme), tokens())
    assert_same_but_for_borders(trained, integers)
    assert relative(logits(config, params_of(tie_embeddings), tokens()), integers) > BORDER


def test_eight_bits_stay_close_and_four_are_farther() -> None:
    expected = logits(TINY, params_of(), tokens())

    def error(name: str, parts: str) -> float:
        found = logits(TINY, quantized(params_of(), find_scheme(name, parts)), tokens())
        return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))

    # Scoring a text rounds keys and values like an 8-bit cache, although it uses no cache.
    assert 1e-4 < abs(error("w4", "cache") - error("w4", ""))
    eight, whole = error("w8a8", ""), error("w8a8", EVERYTHING)
    assert 1e-3 < eight < whole < 0.06 < error("w4a8", "")


def test_every_product_multiplies_int8() -> None:
    params = quantized(params_of(), find_scheme("w8a8", EVERYTHING))
    lowered = logits.lower(TINY, params, tokens()).as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    integers = [p for p in products if re.search(r"xi8>, tensor<\S*xi8>\) -> tensor<\S*xi32>", p)]
    # An application has seven matrices and two products of attention. The body of the scan has two
    # applications. The head is one more product.
    assert len(integers) == 2 * 9 + 1
    assert len(products) == len(integers)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *(("w8a8", EVERYTHING), ("w4a8", "embedding,head,cache")),
        pytest.param("w4g32", "embedding,head", marks=pytest.mark.soak),
    ],
)
def test_decoding_with_a_cache_is_the_forward_pass(name: str, parts: str) -> None:
    """A wrong scale or slot would change a greedy text."""
    params = jax.jit(functools.partial(quantized, scheme=find_scheme(name, parts)))(params_of())
    prompts = [[1, 5, 7, 20, 31], [1, 2]]
    rows = generate(TINY, params, Request(prompts, max_new_tokens=24, sampling=GREEDY))
    for prompt, row in zip(prompts, rows, strict=True):
        whole = jnp.asarray([[*prompt, *row]])
        likeliest = np.asarray(logits(TINY, params, whole)[0, len(prompt) - 1 : -1])
        gap = likeliest.max(-1) - likeliest[np.arange(len(row)), row]
        assert gap.max() < BORDER * np.abs(likeliest).max()
    floats = generate(TINY, params_of(), Request(prompts, max_new_tokens=24, sampling=GREEDY))
    assert rows != floats


def test_decoding_keeps_the_integers() -> None:
    params = quantized(params_of(), find_scheme("w8a8"))
    prepared = prepare(TINY, params)
    for weights in (prepared.params, prepared.weights):
        types = {leaf.dtype.name for leaf in jax.tree.leaves(weights) if leaf.ndim > 1}
        assert types == {"int8", "float32"}
        floats = [leaf for leaf in jax.tree.leaves(weights) if leaf.dtype == jnp.float32]
        # The floats are norms and scales.
        assert sum(leaf.size for leaf in floats) < 0.1 * sum(
            leaf.size for leaf in jax.tree.leaves(weights)
        )
    expected = stored_bytes(decoding_weights(params_of(), TINY))
    assert stored_bytes(prepared.weights) < 0.32 * expected


def test_bytes_are_those_of_values_and_scales() -> None:
    params = quantized(params_of(), find_scheme("w4g32"))
    matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    # 32 inputs are one group, and 48 inputs are two groups.
    scales = 2 * (32 + 2 * 16 + 32 + 2 * 48 + 2 * 32)
    table, norms = 64 * 32 + 4 * 64, 4 * (4 * 32 + 32)
    assert stored_bytes(params) == matrices // 2 + 4 * scales + table + norms
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params_of()))
    assert bits_per_weight(params) == 8 * stored_bytes(params) / numbers
    assert bits_per_weight(params_of()) == 32


def test_parts_say_what_stays_float() -> None:
    params = quantized(params_of(False), find_scheme("w8a8", "head,cache"))
    assert params["embedding"]["table"] is params_of(False)["embedding"]["table"]
    assert isinstance(params["head"]["kernel"], QuantizedKernel)
    assert params["blocks"]["attention"]["products"] == QuantizedAttention(cache=True)
    assert "products" not in quantized(params_of(), find_scheme("w8a8"))["blocks"]["attention"]


def test_a_mesh_changes_nothing() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rules = logical_rules(TINY, mesh.shape)
    scheme = find_scheme("w8a8", EVERYTHING)
    expected = logits(TINY, quantized(params_of(), scheme), tokens(4))

    @jax.jit
    def on_mesh(params: Params) -> jax.Array:
        return Transformer(TINY).apply({"params": quantized(params, scheme)}, tokens(4))

    with use(mesh, rules):
        boxed = jax.eval_shape(lambda: init_boxed(TINY, jax.random.key(0)))
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, list(rules))
        spread = jax.device_put(params_of(), shardings)
        assert not spread["blocks"]["feed_forward"]["up"].is_fully_replicated
        found = on_mesh(spread)
    assert_same_but_for_borders(found, expected)
