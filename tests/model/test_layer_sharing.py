import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.config import ModelConfig, Sharing
from mobilellm_jax.model.attention import attend_within
from mobilellm_jax.model.block import Block
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.rope import rotation
from mobilellm_jax.model.transformer import Params, Transformer, param_shapes

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
SHARED = [(s, r) for s in ("immediate", "repeat_all", "reverse") for r in (2, 3)]


def logits(config: ModelConfig, params: Params) -> jax.Array:
    return jax.jit(lambda p, t: Transformer(config).apply({"params": p}, t))(params, TOKENS)


@pytest.mark.parametrize(
    ("sharing", "two", "three"),
    [
        ("immediate", "0011", "000111222"),
        ("repeat_all", "0101", "012012012"),
        ("reverse", "0110", "012210012"),
    ],
)
def test_order_is_the_papers(sharing: Sharing, two: str, three: str) -> None:
    # Fig. 6 of the paper shows 1 1 2 2, 1 2 1 2 and 1 2 2 1.
    assert "".join(map(str, application_order(2, 2, sharing))) == two
    assert "".join(map(str, application_order(3, 3, sharing))) == three


@pytest.mark.parametrize(
    ("sharing", "repeats"),
    [
        *(("immediate", 2), ("repeat_all", 2), ("reverse", 3)),
        pytest.param("immediate", 3, marks=pytest.mark.soak),
        pytest.param("repeat_all", 3, marks=pytest.mark.soak),
        pytest.param("reverse", 2, marks=pytest.mark.soak),
    ],
)
def test_shared_equals_unshared_with_copied_blocks(
    tiny: Callable[..., ModelConfig],
    strong_params: Params,
    sharing: Sharing,
    repeats: int,
) -> None:
    shared = tiny(sharing=sharing, num_repeats=repeats)
    unshared = tiny(num_blocks=3 * repeats)
    params = strong_params
    order = np.array(application_order(3, repeats, sharing))
    copied = {**params, "blocks": jax.tree.map(lambda x: x[order], params["blocks"])}
    # Both sides compute the same float32 sums, but XLA fuses the two loops differently.
    np.testing.assert_allclose(logits(shared, params), logits(unshared, copied), atol=3e-5)
    other = logits(tiny(), params)
    assert float(jnp.abs(other - logits(shared, params)).max()) > 0.1


@pytest.mark.parametrize("unroll", [1, 2, 3])
def test_scan_equals_an_unrolled_loop(
    tiny: Callable[..., ModelConfig], strong_params: Params, unroll: int
) -> None:
    config = tiny(sharing="reverse", num_repeats=2, scan_unroll=unroll)
    params = strong_params

    def by_hand(params: Params, tokens: jax.Array) -> jax.Array:
        """Calls a block layer after layer, without a scan."""
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        turn = rotation(positions, config)
        attend = attend_within(config, None)
        x = params["embedding"]["table"][tokens]
        for u in application_order(3, 2, "reverse"):
            block = jax.tree.map(lambda leaf, u=u: leaf[u], params["blocks"])
            x, _ = Block(config).apply({"params": block}, x, turn, attend)
        x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_eps)
        return x * params["final_norm"]["scale"][None, None, :] @ params["embedding"]["table"].T

    expected = jax.jit(by_hand)(params, jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits(config, params), expected, atol=3e-5)


def test_repeats_change_no_parameter(tiny: Callable[..., ModelConfig]) -> None:
    def shapes(config: ModelConfig) -> Params:
        return param_shapes(config)

    plain = shapes(tiny())
    assert len(jax.tree.leaves(plain)) == 11
    for sharing, repeats in [*SHARED, ("immediate", 4)]:
        assert shapes(tiny(sharing=sharing, num_repeats=repeats)) == plain


@pytest.mark.parametrize(
    ("remat", "sharing"),
    [
        pytest.param("dots", "immediate", marks=pytest.mark.soak),
        ("dots", "reverse"),
        ("attention", "repeat_all"),
        ("full", "immediate"),
        ("offload", "reverse"),
    ],
)
def test_remat_changes_no_gradient(
    tiny: Callable[..., ModelConfig],
    strong_params: Params,
    remat: str,
    sharing: Sharing,
) -> None:
    plain = tiny(sharing=sharing, num_repeats=2)
    recomputed = tiny(sharing=sharing, num_repeats=2, remat=remat)
    assert plain.remat != recomputed.remat
    params = strong_params

    def gradient(config: ModelConfig) -> tuple[Params, str]:
        def loss(params: Params) -> jax.Array:
            return jnp.sum(
                jnp.square(Transformer(config).apply({"params": params}, jnp.asarray(TOKENS)))
            )

        function = jax.jit(jax.grad(loss))
        return function(params), function.lower(params).as_text()

    (expected, plain_text), (found, text) = gradient(plain), gradient(recomputed)
    assert text.count("dot_general") > plain_text.count(
        "dot_general"
    )  # the backward pass computes products again
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), expected, found)


def test_policies_keep_what_they_say(tiny: Callable[..., ModelConfig]) -> None:
    """The numbers that wait for the backward pass, per token and block, agree with a hand count."""

    def kept(remat: str) -> int:
        config = tiny(remat=remat)
        params = param_shapes(config)

        def residuals(params: Params) -> Any:
            forward = functools.partial(Transformer(config).apply, tokens_BT=jnp.asarray(TOKENS))
            return jax.vjp(lambda p: forward({"params": p}), params)[
                1
            ]  # the leaves of this tree wait

        leaves = jax.tree.leaves(jax.eval_shape(residuals, params))
        stacked = [leaf for leaf in leaves if leaf.shape[:3] == (3, *TOKENS.shape)]
        return sum(leaf.size for leaf in stacked) // (3 * TOKENS.size)

    block_input, attended, gate_and_up = 24, 6 * 6, 2 * 40
    assert kept("full") == kept("offload") == block_input
    assert kept("attention") == block_input + attended
    assert kept("dots") == block_input + attended + gate_and_up
    assert kept("none") > kept("dots")


def test_offload_moves_block_inputs_to_the_host(tiny: Callable[..., ModelConfig]) -> None:
    def moved(remat: str) -> int:
        config = tiny(remat=remat)
        params = param_shapes(config)

        def loss(params: Params) -> jax.Array:
            return jnp.sum(Transformer(config).apply({"params": params}, jnp.asarray(TOKENS)))

        return str(jax.jit(jax.grad(loss)).trace(params).jaxpr).count("f32<host>[3,2,9,24]")

    assert moved("full") == 0
    assert moved("offload") > 0
