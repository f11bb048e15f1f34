"""Computes the cross-entropy over the vocabulary without holding all logits at once.

The sequence is scored in chunks of positions. `weighted_loss` is a scalar. So the forward pass can
compute the gradients of hidden states and head up to one scalar factor. It computes these gradients
while the logits of a chunk exist, and the backward pass multiplies the gradients by the factor. A
chunk then takes three matrix multiplications. It would take four if the backward pass recomputed
the logits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobilellm_jax.model.products import Kernel, scores
from mobilellm_jax.model.transformer import gathered


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_loss(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Returns sum(weights * cross-entropy) in nats, float32.

    Gradients flow to `x_BTD` and `head_VD`. Memory holds the logits of `chunk` positions of every
    row at a time. `chunk` does not have to divide T. The matrix multiplications take operands of
    the type of x, and sum in float32.
    """
    return jnp.sum(token_losses(x_BTD, head_VD, targets_BT, chunk) * weights_BT)


def token_losses(
    x_BTD: Float[Array, "B T D"],
    head_VD: Kernel,
    targets_BT: Int[Array, "B T"],
    chunk: int,
) -> Float[Array, "B T"]:
    """Returns the cross-entropy of every target in nats, float32, for uses without gradients."""
    head_VD = gathered(head_VD.astype(x_BTD.dtype))

    def score(chunk_xs: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BCD, targets_BC = chunk_xs
        logits_BCV = scores("BCD,VD->BCV", x_BCD, head_VD)
        return _losses(logits_BCV, jax.nn.logsumexp(logits_BCV, axis=-1), targets_BC)

    losses_nBC = jax.lax.map(score, (chunks(x_BTD, chunk), chunks(targets_BT, chunk)))
    return unchunk(losses_nBC, targets_BT.shape[1])


def _forward(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    dtype = x_BTD.dtype
    # `gathered` makes the devices exchange the head and its gradient once per step instead of once
    # per chunk.
    narrow_head_VD = gathered(head_VD.astype(dtype))

    def score(
        carry: tuple[jax.Array, jax.Array], chunk_xs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, grad_head_VD = carry
        x_BCD, targets_BC, weights_BC = chunk_xs
        logits_BCV = scores("BCD,VD->BCV", x_BCD, narrow_head_VD)
        log_normalizer_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        total += jnp.sum(_losses(logits_BCV, log_normalizer_BC, targets_BC) * weights_BC)
        # d loss / d logits = softmax - one-hot. A comparison makes the one-hot array, because the
        # compiler can fuse a comparison with the operations around it. It cannot fuse a scatter.
        hit_BCV = jnp.arange(head_VD.shape[0])[None, None, :] == targets_BC[:, :, None]
        softmax_BCV = jnp.exp(logits_BCV - log_normalizer_BC[:, :, None])
        grad_BCV = ((softmax_BCV - hit_BCV) * weights_BC[:, :, None]).astype(dtype)
        grad_x_BCD = jnp.einsum(
            "BCV,VD->BCD", grad_BCV, narrow_head_VD, preferred_element_type=jnp.float32
        ).astype(dtype)
        grad_head_VD += jnp.einsum(
            "BCV,BCD->VD", grad_BCV, x_BCD, preferred_element_type=jnp.float32
        )
        return (total, gathered(grad_head_VD)), grad_x_BCD

    start = (jnp.zeros((), jnp.float32), gathered(jnp.zeros(head_VD.shape, jnp.float32)))
    xs = tuple(chunks(a, chunk) for a in (x_BTD, targets_BT, weights_BT))
    (total, grad_head_VD), grad_x_nBCD = jax.lax.scan(score, start, xs)
    grad_x_BTD = unchunk(grad_x_nBCD, x_BTD.shape[1])
    return total, (grad_x_BTD, gathered(grad_head_VD).astype(head_VD.dtype))


def _backward(
    chunk: int, gradients: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    del chunk
    grad_x_BTD, grad_head_VD = gradients
    scaled_x_BTD = (grad_x_BTD * cotangent).astype(grad_x_BTD.dtype)
    return scaled_x_BTD, (grad_head_VD * cotangent).astype(grad_head_VD.dtype), None, None


weighted_loss.defvjp(_forward, _backward)


def _losses(
    logits_BCV: jax.Array, log_normalizer_BC: jax.Array, targets_BC: jax.Array
) -> jax.Array:
    target_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)
    return log_normalizer_BC - target_BC1[:, :, 0]


def chunks(x_BT: jax.Array, chunk: int) -> jax.Array:
    """Splits [B, T, ...] into [n, B, C, ...]; pads the last chunk with zeros (weight zero).

    The split is along the sequence. If the code flattened rows and positions before the split, the
    devices would have to gather the batch, which is spread over them.
    """
    batch, length = x_BT.shape[:2]
    chunk = min(chunk, length)
    padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BT.ndim - 2)
    padded = jnp.pad(x_BT, padding)
    split = padded.reshape(batch, padded.shape[1] // chunk, chunk, *x_BT.shape[2:])
    return jnp.moveaxis(split, 1, 0)


def unchunk(x_nBC: jax.Array, length: int) -> jax.Array:
    """Joins the chunks that `chunks` made, and drops the padding."""
    x_BnC = jnp.moveaxis(x_nBC, 0, 1)
    return x_BnC.reshape(x_BnC.shape[0], -1, *x_BnC.shape[3:])[:, :length]
