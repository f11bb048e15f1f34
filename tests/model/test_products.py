"""Products and their gradients are compared with a plain einsum and JAX's gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.model.products import product

SHAPES = {
    "BTD,DF->BTF": ((2, 9, 24), (24, 40)),
    "BTD,DNH->BTNH": ((2, 9, 24), (24, 3, 8)),
    "BTNH,NHD->BTD": ((2, 9, 3, 8), (3, 8, 24)),
}


def output_and_gradients(
    function: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array
) -> list[jax.Array]:
    out, pull_back = jax.vjp(function, x, kernel)
    grad = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return [out, *pull_back(grad.astype(out.dtype))]


@pytest.mark.parametrize("spec", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_einsum_in_float32(spec: str, dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in SHAPES[spec])
    found = output_and_gradients(lambda x, w: product(spec, x, w), x, kernel.astype(jnp.float32))
    wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
    expected = output_and_gradients(lambda x, w: jnp.einsum(spec, x, w), *wide)
    assert [leaf.dtype for leaf in found] == [dtype, dtype, jnp.float32]
    for name, ours, theirs in zip(("out", "x", "kernel"), found, expected, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float32) - theirs) / np.linalg.norm(theirs)
        # bfloat16 rounds results and incoming gradients by at most 0.4%.
        assert error < (1e-6 if dtype == jnp.float32 else 6e-3), name


@pytest.mark.parametrize("spec", SHAPES)
def test_bfloat16_products_on_a_cpu_return_their_sums(spec: str) -> None:
    """XLA would multiply in float32 if a bfloat16 product did not return float32 sums."""
    x, kernel = (jnp.ones(shape, jnp.bfloat16) for shape in SHAPES[spec])
    step = jax.jit(lambda x, w: output_and_gradients(lambda x, w: product(spec, x, w), x, w))
    products = [line for line in step.lower(x, kernel).as_text().splitlines() if "dot_gen" in line]
    assert len(products) == 3
    assert all(line.count("bf16>") == 2 and line.endswith("xf32>") for line in products), products


def test_other_devices_multiply_as_they_are_asked() -> None:
    x, kernel = jnp.ones((2, 9, 24), jnp.bfloat16), jnp.ones((24, 40), jnp.bfloat16)
    traced = jax.jit(lambda x, w: product("BTD,DF->BTF", x, w)).trace(x, kernel)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "xf32>" not in lowered
