"""Weight matrices, and matrix multiplications of activations with weights.

`product` defines its own gradient, and asks XLA for float32 sums of bfloat16 operands. Both are
workarounds for XLA's CPU backend, measured on two Zen 4 cores with a block of the 125M model:

- JAX's own gradient of einsum("BTD,DF->BTF") computes the gradient of every weight transposed, and
  the CPU backend then copies the result. The backward pass of a block took 165 ms with JAX's
  gradient, and takes 115 ms with the gradient of this module. See
  https://github.com/jax-ml/jax/issues/19327.
- The CPU backend has fast bfloat16 kernels only for multiplications that return float32 sums: 400
  GFLOP/s. A multiplication that returns bfloat16 reached 100 to 170 GFLOP/s, because a compiler
  pass converts its operands to float32 (https://github.com/jax-ml/jax/pull/22055 describes the
  pass). Other devices sum in float32 for every result type, so they need no workaround.

Remove the gradient of this module when `jax.grad` of a plain einsum is as fast in
`benchmarks/train_step.py`. Remove `_einsum` when a bfloat16 multiplication on a CPU is as fast with
a bfloat16 result as with a float32 result.
"""

import abc
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class SpecialKernel(abc.ABC):
    """A weight matrix that defines its own multiplication, such as an integer matrix."""

    integer_products: Any
    """Whether activations are rounded to 8 bits before the multiplication."""

    @property
    def T(self) -> Any:  # noqa: N802  # the name that arrays use
        return jax.tree.map(lambda array: array.T, self)

    @abc.abstractmethod
    def astype(self, dtype: jax.typing.DTypeLike) -> "SpecialKernel":
        """Converts floating-point values; does not change integers."""

    @abc.abstractmethod
    def __getitem__(self, rows: Int[Array, "*rows"]) -> Float[Array, "*rows columns"]:
        """Returns rows of the matrix as floating-point numbers."""

    @abc.abstractmethod
    def operands(self, spec: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the two floating-point arrays whose einsum is the product."""

    def multiply(self, spec: str, x: jax.Array, multiply: Callable[..., jax.Array]) -> jax.Array:
        """Returns einsum(spec, x, matrix); `multiply` is the caller's einsum of float arrays."""
        return multiply(spec, *self.operands(spec, x))


Kernel = Array | SpecialKernel
"""A weight matrix in any form that `product` accepts."""


def matrix(module: Any, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Kernel:
    """Returns the float32 matrix `name` of a module that has the model's `config`.

    Initialisation draws every matrix and the embedding table from N(0, model.init_std^2), with no
    scaling by depth, as in the paper's published code. `axes` are logical names (`sharding.py`).
    """
    normal = nn.initializers.normal(module.config.init_std)
    init = nn.with_logical_partitioning(normal, axes)
    return cast(Kernel, module.param(name, init, shape, jnp.float32))


def product(spec: str, x: jax.Array, kernel: Kernel) -> jax.Array:
    """Returns einsum(spec, x, kernel) in the type of x; sums are float32, also in the gradient.

    `spec` names two inputs and an output, such as "BTD,DF->BTF". Every letter of an input occurs in
    the other input or in the output.
    """
    if isinstance(kernel, SpecialKernel):
        return kernel.multiply(spec, x, product).astype(x.dtype)
    return _product(spec, x, kernel.astype(x.dtype))


def scores(spec: str, x: jax.Array, head: Kernel) -> jax.Array:
    """Returns einsum(spec, x, head) in float32; a float head is converted to the type of x."""
    if isinstance(head, SpecialKernel):
        return head.multiply(spec, x, scores)
    return jnp.einsum(spec, x, head.astype(x.dtype), preferred_element_type=jnp.float32)


def operands(spec: str, x: jax.Array, kernel: Kernel) -> tuple[jax.Array, jax.Array]:
    """Returns the two float arrays that `product` multiplies."""
    return kernel.operands(spec, x) if isinstance(kernel, SpecialKernel) else (x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _einsum(spec, x, kernel)


def _forward(
    spec: str, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum(spec, x, kernel), (x, kernel)


def _backward(
    spec: str, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    inputs, out_axes = spec.split("->")
    x_axes, kernel_axes = inputs.split(",")
    grad_x = _einsum(f"{out_axes},{kernel_axes}->{x_axes}", grad, kernel)
    return grad_x, _einsum(f"{x_axes},{out_axes}->{kernel_axes}", x, grad)


_product.defvjp(_forward, _backward)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    plain = partial(jnp.einsum, spec)
    if a.dtype == jnp.float32:
        return plain(a, b)
    with_float32_sums = partial(_einsum_with_float32_sums, spec)
    product: jax.Array = jax.lax.platform_dependent(a, b, cpu=with_float32_sums, default=plain)
    return product


def _einsum_with_float32_sums(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(a.dtype)
