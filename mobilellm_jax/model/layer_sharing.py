"""Layer sharing (paper Sec. 2.5 and Fig. 6): each block is applied R times, in one of 3 orders.

One scan runs over the stacked weights of the unique blocks. Under `immediate` (1 1 2 2) the body of
the scan applies its block R times. Under `repeat_all` (1 2 1 2) the scan itself runs R times. Under
`reverse` (1 2 2 1) every second scan runs backwards. The shapes of the parameters do not depend on
the order and the number of a block's applications.
"""

from collections.abc import Callable
from typing import Any, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mobilellm_jax.config import ModelConfig, Remat, Sharing
from mobilellm_jax.model.attention import Attend
from mobilellm_jax.model.block import Block
from mobilellm_jax.model.rope import Rotation
from mobilellm_jax.model.softmax import SAVED

Carry = tuple[Float[Array, "B T D"], Any]
"""The residual stream, and the memory that attention keeps between layers (a cache or None)."""

_BLOCK_INPUT = "block_input"
_KEPT: dict[str, tuple[str, ...]] = {
    # Queries, keys and values are recomputed. On a v5e, to store and read them takes longer.
    "dots": (SAVED, "gate", "up"),
    "attention": (SAVED,),
    "full": (),
}
# cuDNN's backward pass needs a second result of its forward pass. JAX gives this result no
# checkpoint name, so the policy selects the primitive by name.
_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


def application_order(num_blocks: int, num_repeats: int, sharing: Sharing) -> tuple[int, ...]:
    """Returns the block number of every applied layer, from the first layer to the last.

    >>> application_order(3, 2, "immediate")
    (0, 0, 1, 1, 2, 2)
    >>> application_order(3, 2, "repeat_all")
    (0, 1, 2, 0, 1, 2)
    >>> application_order(3, 3, "reverse")
    (0, 1, 2, 2, 1, 0, 0, 1, 2)
    """
    blocks = range(num_blocks)
    match sharing:
        case "immediate":
            return tuple(b for b in blocks for _ in range(num_repeats))
        case "repeat_all":
            return tuple(blocks) * num_repeats
        case "reverse":
            passes = [reversed(blocks) if r % 2 else blocks for r in range(num_repeats)]
            return tuple(b for one_pass in passes for b in one_pass)
        case _:
            assert_never(sharing)


def _policy(remat: Remat) -> Any:
    """Returns JAX's policy that selects which results of a block are kept for its backward pass."""
    policies = jax.checkpoint_policies
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    by_name = policies.save_only_these_names(*_KEPT[remat])
    if SAVED not in _KEPT[remat]:
        return by_name
    return policies.save_from_both_policies(
        by_name, lambda primitive, *_, **__: primitive.name == _CUDNN_FORWARD
    )


def apply_blocks(
    blocks: Block,
    config: ModelConfig,
    x_BTD: Float[Array, "B T D"],
    turn: Rotation,
    attend_in_slot: Callable[[Any, Int[Array, ""]], Attend],
    memory: Any = None,
) -> Carry:
    """Runs all applied layers; returns the residual stream and the memory after the last layer.

    `blocks` holds the stacked parameters of the unique blocks. `attend_in_slot(memory, slot)`
    returns the `Attend` of a layer. The slot of a layer is its index in `application_order`.
    """

    def apply_block(block: Block, carry: Carry, slot: Int[Array, ""]) -> Carry:
        x_BTD, memory = carry
        x_BTD = checkpoint_name(x_BTD, _BLOCK_INPUT)
        return block(x_BTD, turn, attend_in_slot(memory, slot))

    if config.remat != "none":
        # `prevent_cse` is not needed, because in a scan XLA cannot merge the recomputation with the
        # forward pass.
        apply_block = nn.remat(apply_block, policy=_policy(config.remat), prevent_cse=False)

    def body(block: Block, carry: Carry, slots_R: Int[Array, "R"]) -> tuple[Carry, None]:
        for r in range(slots_R.shape[0]):
            carry = apply_block(block, carry, slots_R[r])
        return carry, None

    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    slots_UR = np.stack([np.flatnonzero(np.equal(order, u)) for u in range(config.num_blocks)])
    num_scans = 1 if config.sharing == "immediate" else config.num_repeats
    carry = (x_BTD, memory)
    for r, scan_slots_UR in enumerate(np.split(slots_UR, num_scans, axis=1)):
        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_blocks,
            reverse=config.sharing == "reverse" and r % 2 == 1,
            unroll=config.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "blocks"},
            # The check traces the body once more, so it is off after initialization. During
            # initialization it is on: without it, a new model would get other random numbers.
            check_constancy_invariants=blocks.is_initializing(),
        )
        carry, _ = scan(blocks, carry, jnp.asarray(scan_slots_UR, jnp.int32))
    return carry
