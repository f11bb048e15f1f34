"""Every kernel is compared with softmax attention in float32.

A kernel runs on its device, or interpreted, or a test at least lowers it. `test_softmax.py`
compares softmax attention with its definition.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mobilellm_jax.config import Config, ModelConfig, Remat
from mobilellm_jax.config.rules import ATTENTION
from mobilellm_jax.model import attention_kernels
from mobilellm_jax.model.attention_kernels import segment_starts, self_attention, splash, tokamax
from mobilellm_jax.model.on_device import device_violations
from mobilellm_jax.model.softmax import attend_by_token, causal_mask
from mobilellm_jax.model.transformer import Params, Transformer, param_shapes
from mobilellm_jax.sharding import AXES, logical_rules, use

LENGTH = 256
# Row 0 has document borders inside blocks. Row 1 has one on the edge of a block, and documents of
# one token.
SEGMENTS_BT = np.sort(
    np.stack([np.arange(LENGTH) // 100, np.where(np.arange(LENGTH) < 128, 0, np.arange(LENGTH))]), 1
).astype(np.int32)

Attend = Callable[..., jax.Array]


def inputs(dtype: Any, heads: int = 4, kv_heads: int = 2, head_dim: int = 16) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(2, LENGTH, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def output_and_gradients(function: Attend, *arrays: jax.Array) -> list[np.ndarray]:
    """Returns the output and the gradients of the inputs; the last array is the cotangent."""
    *qkv, cotangent = arrays

    @jax.jit
    def both(*qkv: jax.Array) -> tuple[jax.Array, ...]:
        out, pull_back = jax.vjp(function, *qkv)
        return out, *pull_back(cotangent.astype(out.dtype))

    return [np.asarray(x, np.float32) for x in both(*qkv)]


def reference(segments_BT: np.ndarray | None, *arrays: jax.Array) -> list[np.ndarray]:
    segments = None if segments_BT is None else jnp.asarray(segments_BT)
    mask = causal_mask(LENGTH, segments)
    wide = [x.astype(jnp.float32) for x in arrays]
    return output_and_gradients(lambda q, k, v: attend_by_token(q, k, v, mask), *wide)


def assert_equal_to_reference(
    function: Attend, segments_BT: np.ndarray | None, arrays: list[jax.Array], tolerance: float
) -> None:
    """Compares the output and each gradient; the tolerance is relative to the norm."""
    segments = None if segments_BT is None else jnp.asarray(segments_BT)
    found = output_and_gradients(lambda q, k, v: function(q, k, v, segments), *arrays)
    expected = reference(segments_BT, *arrays)
    for name, ours, theirs in zip(("out", "q", "k", "v"), found, expected, strict=True):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < tolerance, name
    other = reference(None if segments_BT is not None else SEGMENTS_BT, *arrays)
    for ours, unlike in zip(found, other, strict=True):  # the mask changes every array
        assert np.linalg.norm(ours - unlike) / np.linalg.norm(unlike) > 0.1


@pytest.mark.parametrize(
    ("heads", "segments_BT"),
    [((4, 2), SEGMENTS_BT), ((3, 1), None), ((2, 2), SEGMENTS_BT)],
    ids=["documents", "concat", "documents without groups"],
)
def test_splash_interpreted(heads: tuple[int, int], segments_BT: np.ndarray | None) -> None:
    arrays = inputs(jnp.float32, *heads)
    # The tolerance allows for float32 sums over 256 keys in another order.
    run = functools.partial(splash, interpret=True)
    assert_equal_to_reference(run, segments_BT, arrays, 1e-5)


def test_splash_interpreted_in_bfloat16() -> None:
    # Inputs and results have 8 bits. Scores and sums are float32.
    run = functools.partial(splash, interpret=True)
    assert_equal_to_reference(run, SEGMENTS_BT, inputs(jnp.bfloat16), 2**-7)


@pytest.mark.parametrize("segments_BT", [None, SEGMENTS_BT], ids=["concat", "documents"])
def test_under_a_mesh_each_device_has_its_rows_and_heads(
    monkeypatch: pytest.MonkeyPatch, segments_BT: np.ndarray | None
) -> None:
    """The mesh splits rows and heads; devices send nothing; the result is that of one device."""
    mesh = jax.make_mesh(
        (2, 1, 2, 1), AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:4]
    )
    rules = logical_rules(ModelConfig(num_heads=4, num_kv_heads=2), mesh.shape)
    shapes = set()

    def local(*arrays: Any) -> jax.Array:
        shapes.add(tuple(None if a is None else a.shape for a in arrays))
        return attend_by_token(*arrays[:3], causal_mask(LENGTH, arrays[3]))

    monkeypatch.setitem(attention_kernels._KERNELS, "splash", local)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    arrays = [jax.device_put(x, sharding) for x in inputs(jnp.float32)]
    segments = None if segments_BT is None else jnp.asarray(segments_BT)
    with use(mesh, rules):
        run = lambda q, k, v: self_attention("splash", q, k, v, segments)  # noqa: E731
        text = jax.jit(run).lower(*arrays[:3]).compile().as_text()
        found = output_and_gradients(run, *arrays)
    rows = None if segments is None else (1, LENGTH)
    assert shapes == {((1, LENGTH, 2, 16), (1, LENGTH, 1, 16), (1, LENGTH, 1, 16), rows)}
    assert "all-gather" not in text and "all-to-all" not in text
    for ours, theirs in zip(found, reference(segments_BT, *arrays), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_segments_start_where_they_change() -> None:
    found = segment_starts(jnp.asarray([[7, 7, 7, 9, 9, 3], [1, 2, 3, 3, 3, 3]], jnp.int32))
    np.testing.assert_array_equal(found, [[0, 0, 0, 3, 3, 5], [0, 1, 2, 2, 2, 2]])


def test_every_implementation_is_there() -> None:
    assert {*attention_kernels._KERNELS, "xla"} == set(ATTENTION)


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is optional")
@pytest.mark.parametrize("segments_BT", [None, SEGMENTS_BT], ids=["concat", "documents"])
def test_tokamax_told_by_first_keys(segments_BT: np.ndarray | None) -> None:
    """Tokamax's reference implementation takes the same arguments as its kernel."""
    # The command line parses the flags too. Otherwise Tokamax 0.0.12 would read pytest's arguments.
    flags.FLAGS.mark_as_parsed()

    def run(*arrays: Any) -> jax.Array:
        with jax.numpy_rank_promotion("allow"):  # Tokamax 0.0.17 promotes ranks
            return tokamax(*arrays, implementation="xla")

    assert_equal_to_reference(run, segments_BT, inputs(jnp.float32), 1e-5)


def test_cudnn_is_lowered_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, JAX still lowers the kernel calls, and `remat` recomputes the right ones."""
    # JAX asks the installed cuDNN for its version before it lowers a kernel.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    config = ModelConfig(
        vocab_size=64,
        embed_dim=32,
        num_blocks=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        ffn_dim=32,
        compute_dtype="bfloat16",
        attention="cudnn",
    )
    params = param_shapes(config)
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def kernels(remat: Remat) -> list[str]:
        model = Transformer(dataclasses.replace(config, remat=remat))

        def loss(params: Params, tokens: jax.Array) -> jax.Array:
            hidden = model.apply({"params": params}, tokens, method="hidden")
            return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

        traced = jax.jit(jax.grad(loss)).trace(params, tokens)
        return re.findall(r"__cudnn\$\w+", traced.lower(lowering_platforms=("cuda",)).as_text())

    forward, backward = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    for remat in ("none", "dots", "attention"):
        assert kernels(remat) == [forward, backward]
    assert kernels("full") == [forward, forward, backward]


@pytest.mark.device
@pytest.mark.parametrize(
    ("name", "documents"),
    [(n, d) for n in attention_kernels._KERNELS for d in (False, ATTENTION[n].documents)],
)
def test_on_its_device(name: str, documents: bool) -> None:
    wide = dataclasses.replace(Config().model, compute_dtype="bfloat16", attention=name)
    missing = device_violations(Config(model=wide), jax.devices()[0])
    if missing:
        pytest.skip(missing[0])
    segments_BT = SEGMENTS_BT if documents else None
    # The 125M model has 9 and 3 heads of 64 channels. Inputs and results have 8 bits.
    arrays = inputs(jnp.bfloat16, 9, 3, 64)
    assert_equal_to_reference(
        functools.partial(self_attention, name), segments_BT, arrays, tolerance=2**-7
    )
