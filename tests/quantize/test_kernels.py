"""Quantized products are compared with NumPy; straight-through gradients follow their rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.model.products import operands, product, scores
from mobilellm_jax.model.softmax import attend_by_token
from mobilellm_jax.quantize.attention import QuantizedAttention
from mobilellm_jax.quantize.integers import (
    integer_einsum,
    on_levels,
    scale_of,
    to_rows,
    tokens_on_levels,
)
from mobilellm_jax.quantize.kernels import (
    QuantizedKernel,
    TrainedKernel,
    dequantized,
    to_kernel,
    to_trained_kernel,
)

# Every product of the model: the shapes of x and kernel, and the number of the kernel's input axes.
PRODUCTS = {
    "BTD,DNH->BTNH": ((2, 5, 24), (24, 3, 8), 1),
    "BTNH,NHD->BTD": ((2, 5, 3, 8), (3, 8, 24), 2),
    "BTD,DF->BTF": ((2, 5, 24), (24, 40), 1),
    "BTF,FD->BTD": ((2, 5, 40), (40, 24), 1),
    "BTD,DV->BTV": ((2, 5, 24), (24, 61), 1),
    "BTD,DKJH->BTKJH": ((3, 1, 24), (24, 2, 4, 8), 1),
    "BTD,DJF->BTJF": ((3, 1, 24), (24, 2, 40), 1),
    "BTQ,QD->BTD": ((3, 1, 24), (24, 40), 1),
}
# The tolerance allows for a few float32 roundings.
FLOAT32 = 1e-6
LEVELS = {8: 127, 4: 7}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rows_by_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes along the last axis by the definition of symmetric min-max."""
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    return np.round(x / scale).astype(np.int8), scale


def groups_by_numpy(kernel_IO: np.ndarray, bits: int, size: int) -> list[tuple[slice, np.ndarray]]:
    """Returns the inputs and the scales of every group."""
    slices = [slice(start, start + size) for start in range(0, len(kernel_IO), size)]
    scales = [np.abs(kernel_IO[s]).max(0) / np.float32(LEVELS[bits]) for s in slices]
    return list(zip(slices, scales, strict=True))


@pytest.mark.parametrize("spec", PRODUCTS)
@pytest.mark.parametrize(
    ("bits", "size"),
    [
        *((8, 0), (4, 8)),
        pytest.param(8, 8, marks=pytest.mark.soak),
        pytest.param(4, 16, marks=pytest.mark.soak),
    ],
)
def test_integer_product_equals_numpy(spec: str, bits: int, size: int) -> None:
    x_shape, kernel_shape, num_inputs = PRODUCTS[spec]
    x, kernel = normal(*x_shape), normal(*kernel_shape, seed=1)
    quantized = to_kernel(jnp.asarray(kernel), num_inputs=num_inputs, bits=bits, group_size=size)
    found = product(spec, jnp.asarray(x), quantized)

    kernel_IO = kernel.reshape(np.prod(kernel_shape[:num_inputs]), -1)
    x_RI = x.reshape(-1, len(kernel_IO))
    x_values, x_scale = rows_by_numpy(x_RI)
    expected = np.zeros((len(x_RI), kernel_IO.shape[1]))
    for inputs, scale in groups_by_numpy(kernel_IO, bits, size or len(kernel_IO)):
        values = np.round(kernel_IO[inputs] / scale).astype(np.int8)
        np.testing.assert_array_equal(
            values, np.asarray(quantized.values.astype(jnp.int8)).reshape(kernel_IO.shape)[inputs]
        )
        sums = x_values[:, inputs].astype(np.int32) @ values.astype(np.int32)
        ours = integer_einsum("RI,IO->RO", jnp.asarray(x_values[:, inputs]), jnp.asarray(values))
        assert ours.dtype == jnp.int32
        np.testing.assert_array_equal(ours, sums)
        expected += sums * scale.astype(np.float64) * x_scale
    np.testing.assert_array_equal(to_rows(jnp.asarray(x_RI)).values, x_values)
    error = np.abs(np.asarray(found).reshape(expected.shape) - expected).max()
    assert error <= FLOAT32 * np.abs(expected).max()


def test_a_tied_head_has_the_layout_of_the_table() -> None:
    x, table = normal(2, 5, 24), normal(61, 24, seed=1)
    table = jnp.asarray(table)
    rows = to_kernel(table.T, num_inputs=1, bits=8).T
    assert rows.values.shape == (61, 24) and rows.scale.shape == (61, 1)
    found = scores("BTD,VD->BTV", jnp.asarray(x), rows)
    expected = scores("BTD,DV->BTV", jnp.asarray(x), rows.T)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [0, 8, 16])
def test_weights_alone_leave_activations_as_they_are(size: int) -> None:
    x, kernel = jnp.asarray(normal(2, 5, 24)), jnp.asarray(normal(24, 40, seed=1))
    quantized = to_kernel(kernel, num_inputs=1, bits=4, group_size=size, integer_products=False)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantized(quantized, num_inputs=1))
    found = product("BTD,DF->BTF", x, quantized)
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32 * np.abs(expected).max())


@pytest.mark.parametrize(("bits", "size"), [(8, 0), (4, 0), (4, 8), (8, 16)])
def test_no_number_is_farther_than_half_a_step(bits: int, size: int) -> None:
    kernel = normal(24, 40)
    quantized = to_kernel(jnp.asarray(kernel), num_inputs=1, bits=bits, group_size=size)
    off = np.abs(np.asarray(dequantized(quantized, num_inputs=1)) - kernel)
    for inputs, scale in groups_by_numpy(kernel, bits, size or 24):
        assert (off[inputs] <= scale * 0.500001).all()
    assert abs(np.asarray(quantized.values.astype(jnp.int8))).max() == LEVELS[bits]


def test_the_last_group_may_be_shorter() -> None:
    kernel = normal(20, 4)
    kernel[16:] *= 100
    quantized = to_kernel(jnp.asarray(kernel), num_inputs=1, bits=8, group_size=8)
    assert quantized.scale.shape == (3, 4)
    np.testing.assert_allclose(quantized.scale[2], np.abs(kernel[16:]).max(0) / 127, rtol=1e-6)
    x = jnp.asarray(normal(3, 20, seed=1))
    expected = np.asarray(x) @ np.asarray(dequantized(quantized, num_inputs=1))
    # Rounding x to 8 bits adds an error of up to half a step of 1/127 to each of 20 terms.
    error = np.abs(product("BD,DF->BF", x, quantized) - expected).max()
    assert error < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("size", [0, 4])
def test_zeros_stay_zeros(size: int) -> None:
    kernel = normal(8, 3)
    kernel[:, 1] = 0  # a channel
    kernel[:4, 2] = 0  # a group, where there are groups
    quantized = to_kernel(jnp.asarray(kernel), num_inputs=1, bits=4, group_size=size)
    assert np.asarray(quantized.scale)[:, 1].tolist() == [1.0] * quantized.scale.shape[0]
    x = normal(2, 8, seed=1)
    x[1] = 0  # a token
    found = np.asarray(product("BD,DF->BF", jnp.asarray(x), quantized))
    assert np.isfinite(found).all()
    assert (found[:, 1] == 0).all() and (found[1] == 0).all() and (found[0, ::2] != 0).all()


def test_numbers_too_small_for_a_scale_are_zeros() -> None:
    rows = to_rows(jnp.asarray([[1e-39, -1e-42]], jnp.float32))
    assert rows.scale.tolist() == [[1.0]] and rows.values.tolist() == [[0, 0]]


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
def test_no_tokens_are_no_tokens(shape: tuple[int, ...]) -> None:
    kernel = to_kernel(jnp.ones((24, 3)), num_inputs=1, bits=8)
    spec = "BD,DF->BF" if len(shape) == 2 else "BTD,DF->BTF"
    assert product(spec, jnp.zeros(shape), kernel).shape == (*shape[:-1], 3)


@pytest.mark.parametrize("size", [0, 32])
def test_no_inputs_sum_to_nothing(size: int) -> None:
    kernel = to_kernel(jnp.zeros((0, 3)), num_inputs=1, bits=8, group_size=size)
    np.testing.assert_array_equal(product("BD,DF->BF", jnp.zeros((2, 0)), kernel), np.zeros((2, 3)))


def test_outlier_costs_its_row_and_no_other() -> None:
    x = normal(3, 64)
    x[1, 5] = 1e4
    rows = to_rows(jnp.asarray(x))
    assert rows.values[1, 5] == 127
    assert (np.delete(np.asarray(rows.values[1]), 5) == 0).all()
    np.testing.assert_array_equal(rows.values[::2], rows_by_numpy(x[::2])[0])


def test_a_number_that_is_not_finite_spoils_its_token_only() -> None:
    x = normal(3, 24)
    x[1, 5] = np.nan
    kernel = to_kernel(jnp.asarray(normal(24, 4)), num_inputs=1, bits=8)
    found = np.asarray(product("BD,DF->BF", jnp.asarray(x), kernel))
    assert np.isnan(found[1]).all() and np.isfinite(found[::2]).all()


def test_gradient_is_one_within_the_range_and_zero_beyond() -> None:
    x = jnp.asarray([-20.0, -7.4, -3.2, 0.0, 0.6, 7.0, 7.4, 7.6, 20.0])
    scale = jnp.asarray(1.0)
    out, pull_back = jax.vjp(lambda x, s: on_levels(x, s, 4), x, scale)
    grad = jnp.arange(1.0, 10.0)
    of_x, of_scale = pull_back(grad)
    assert out.tolist() == [-7, -7, -3, 0, 1, 7, 7, 7, 7]
    assert of_x.tolist() == [0, 2, 3, 4, 5, 6, 7, 0, 0]
    assert float(of_scale) == 0


def test_min_max_clips_nothing() -> None:
    """The largest number sets the scale, and its gradient passes through like any other."""
    x = jnp.asarray(normal(5, 24))
    grad = jax.grad(lambda x: jnp.sum(tokens_on_levels(x) * jnp.arange(24.0)[None, :]))(x)
    np.testing.assert_array_equal(grad, np.tile(np.arange(24.0, dtype=np.float32), (5, 1)))
    kernel = jnp.asarray(normal(24, 6))
    how = {"num_inputs": 1, "bits": 4, "group_size": 8}
    grad = jax.grad(lambda k: jnp.sum(to_trained_kernel(k, **how).values))(kernel)
    np.testing.assert_array_equal(grad, np.ones((24, 6)))


@pytest.mark.parametrize("spec", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF"])
@pytest.mark.parametrize(("bits", "size"), [(8, 0), (4, 8), (4, 16)])
def test_trained_product_is_the_integer_one(spec: str, bits: int, size: int) -> None:
    x_shape, kernel_shape, num_inputs = PRODUCTS[spec]
    x, kernel = jnp.asarray(normal(*x_shape)), jnp.asarray(normal(*kernel_shape, seed=1))
    how = {"num_inputs": num_inputs, "bits": bits, "group_size": size}
    trained = product(spec, x, to_trained_kernel(kernel, **how))
    integer = product(spec, x, to_kernel(kernel, **how))
    # Both sides sum the same numbers, one in float32 and one in integers.
    np.testing.assert_allclose(trained, integer, rtol=0, atol=1e-5 * float(abs(integer).max()))
    assert float(abs(trained - product(spec, x, kernel)).max()) > 1e-3


def test_operands_of_weights_alone_are_activations_as_they_are() -> None:
    x = jnp.asarray(normal(2, 24))
    for integer_products in (True, False):
        kept, _ = operands(
            "BD,DF->BF", x, TrainedKernel(jnp.ones((24, 3)), integer_products=integer_products)
        )
        assert bool((kept == x).all()) != integer_products


def test_scale_is_a_level_of_the_largest() -> None:
    found = scale_of(jnp.asarray([254.0, 0.0, np.nan]), 8)
    assert found[0] == 2 and found[1] == 1 and np.isnan(found[2])


def test_attention_in_8_bits_equals_numpy() -> None:
    q, k, v = normal(2, 5, 4, 8), normal(2, 7, 2, 8, seed=1), normal(2, 7, 2, 8, seed=2)
    mask = np.arange(7)[None, None, :] <= np.arange(5)[None, :, None] + 2
    found = attend_by_token(*map(jnp.asarray, (q, k, v, mask)), QuantizedAttention(products=True))
    expected = np.zeros(q.shape)
    for b in range(2):
        for n in range(4):
            (qi, qs), (ki, ks), (vi, vs) = (
                rows_by_numpy(x) for x in (q[b, :, n], k[b, :, n // 2], v[b, :, n // 2])
            )
            logits = (qi.astype(np.int32) @ ki.T.astype(np.int32)) * qs * ks.T
            logits = np.where(mask[0], logits, -np.inf) / np.sqrt(np.float32(8))
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            wi, ws = rows_by_numpy((weights * vs.T).astype(np.float32))
            sums = wi.astype(np.int32) @ vi.astype(np.int32)
            expected[b, :, n] = sums * ws / weights.sum(-1, keepdims=True)
    # A weight at the border of two levels may round to either level.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_integers_are_summed_in_32_bits() -> None:
    """127 x 127 x 3,000 needs more than 16 bits, and float32 could not represent it exactly."""
    ones = jnp.full((1, 3000), 127, jnp.int8)
    assert integer_einsum("RI,OI->RO", ones, ones).tolist() == [[127 * 127 * 3000]]


def test_four_bits_take_half_a_byte() -> None:
    kernel: QuantizedKernel = to_kernel(jnp.ones((24, 40)), num_inputs=1, bits=4, group_size=8)
    compiled = jax.jit(lambda v: v.astype(jnp.int8)).lower(kernel.values).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 24 * 40 // 2
