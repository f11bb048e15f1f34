"""Builds AdamW with warm-up and decay, as in the paper (Sec. 3.1), or Muon, from parts of Optax.

Weight decay is decoupled, and applies to every matrix and to the embedding table, but not to norms.
During the warm-up, step t (counted from 0) has the learning rate peak * t / number of warm-up
steps. So the first update is zero, as in the schedules of Hugging Face, which the paper's code
uses. After the warm-up, the schedules `cosine` and `wsd` lower the rate to `min_lr_ratio` of the
peak.
"""

import math
from typing import Any, assert_never

import jax
import optax

from mobilellm_jax.config import OptimizerConfig

ParamsOrPlaceholder = Any
"""A tree of parameters, or a placeholder by which Optax finds parameter arrays in a state."""

_WSD_DECAY_SHARE = 0.2  # The fraction of the steps, at the end, in which the learning rate falls.
# The root mean square of AdamW's updates. Muon's updates are scaled to the same root mean square,
# so that one learning rate fits both (Liu et al. 2025, arXiv:2502.16982).
_ADAMW_RMS = 0.2
_FIRST_TO_SECOND = optax.contrib.MuonDimensionNumbers(1, 2)
_MUON_AXES = {  # Axis 0 counts the blocks.
    **dict.fromkeys(("gate", "up", "down"), _FIRST_TO_SECOND),
    **dict.fromkeys(("query", "key", "value"), optax.contrib.MuonDimensionNumbers(1, (2, 3))),
    "output": optax.contrib.MuonDimensionNumbers((1, 2), 3),
}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, for a run of `steps` steps."""
    final = config.peak_lr * config.min_lr_ratio
    warmup = optax.linear_schedule(0.0, config.peak_lr, config.warmup_steps)
    remaining = steps - config.warmup_steps
    constant = optax.constant_schedule(config.peak_lr)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(config.peak_lr, remaining, config.min_lr_ratio)
            parts, borders = [warmup, decay], [config.warmup_steps]
        case "wsd":
            length = max(1, min(remaining, round(steps * _WSD_DECAY_SHARE)))
            decay = optax.linear_schedule(config.peak_lr, final, length)
            parts, borders = [warmup, constant, decay], [config.warmup_steps, steps - length]
        case "constant":
            parts, borders = [warmup, constant], [config.warmup_steps]
        case _:
            assert_never(config.schedule)
    return optax.join_schedules(parts, borders)


def updates_made(state: optax.OptState) -> Any:
    """Returns the number of updates in a state of an optimizer or in a larger tree."""
    # Every `count` in the state is this number, so the code reads the first.
    (_, count), *_ = optax.tree.get_all_with_path(state, "count")
    return count


def is_matrix(params: ParamsOrPlaceholder) -> Any:
    """Returns a tree: True for leaves with weight decay, False for the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def muon_axes(params: ParamsOrPlaceholder) -> Any:
    """Returns input and output axes of the leaves that Muon updates, and None for other leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _axes(path), params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW or Muon; clips gradients by global norm first if `clip_norm` is not 0."""
    schedule = learning_rate(config, steps)
    update = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=is_matrix,
    )
    match config.name:
        case "adamw":
            pass
        case "muon":
            # `optax.contrib.muon` is not used, because its inner AdamW takes Nesterov steps and
            # decays the norms.
            muon = optax.chain(
                optax.contrib.scale_by_muon(eps=config.eps, weight_dimension_numbers=muon_axes),
                optax.stateless(lambda updates, _: _with_rms_of_adamw(updates)),
                optax.add_decayed_weights(config.weight_decay),
                optax.scale_by_learning_rate(schedule),
            )
            update = optax.partition({"muon": muon, "adamw": update}, _update_of_leaf)
        case _:
            assert_never(config.name)
    if config.clip_norm == 0:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _with_rms_of_adamw(updates: ParamsOrPlaceholder) -> Any:
    """Scales orthogonal updates to the root mean square of AdamW's updates.

    The root mean square of an orthogonal matrix is 1 / sqrt(longer side).
    """

    def scale(update: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        sides = [
            math.prod(update.shape[a] for a in (side if isinstance(side, tuple) else (side,)))
            for side in axes
        ]
        return update * (_ADAMW_RMS * math.sqrt(max(sides)))

    return jax.tree.map(scale, updates, muon_axes(updates))


def _update_of_leaf(params: ParamsOrPlaceholder) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _axes(path) else "adamw", params
    )


def _axes(path: tuple[Any, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    return _MUON_AXES.get(path[-1].key) if path[0].key == "blocks" else None
