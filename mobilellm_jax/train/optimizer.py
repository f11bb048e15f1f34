"""AdamW with warm-up and decay, as in the paper (Sec. 3.1): Optax parts, put together.

Decay is decoupled and applies to every matrix, the embedding table included, not to norms. The
learning rate of step t (counted from 0) is peak * t / warm-up, then falls to `min_lr_ratio` of the
peak at the last step; the first update is therefore zero, as in Hugging Face's schedules, which the
paper's code uses.
"""

from typing import Any, cast

import jax
import optax

from mobilellm_jax.config import OptimizerConfig
from mobilellm_jax.model.transformer import Params

_WSD_DECAY_SHARE = 0.2  # of all steps, at the end


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, for a run of `steps` steps."""
    final = config.peak_lr * config.min_lr_ratio
    warmup = optax.linear_schedule(0.0, config.peak_lr, config.warmup_steps)
    remaining = steps - config.warmup_steps
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(config.peak_lr, remaining, config.min_lr_ratio)
        parts, borders = [warmup, decay], [config.warmup_steps]
    elif config.schedule == "wsd":
        length = max(1, min(remaining, round(steps * _WSD_DECAY_SHARE)))
        decay = optax.linear_schedule(config.peak_lr, final, length)
        parts = [warmup, optax.constant_schedule(config.peak_lr), decay]
        borders = [config.warmup_steps, steps - length]
    else:
        parts, borders = [warmup, optax.constant_schedule(config.peak_lr)], [config.warmup_steps]
    return optax.join_schedules(parts, borders)


def is_matrix(params: Params) -> Params:
    """Returns True at every leaf that weight decay applies to: all but the norms' scales."""

    def decays(path: tuple[Any, ...], _: object) -> bool:
        # A boxed leaf has the box's attribute as the last part of its path.
        return all(getattr(part, "key", None) != "scale" for part in path)

    return cast(Params, jax.tree_util.tree_map_with_path(decays, params))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns clipping by global norm (if any), then AdamW."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=is_matrix,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
