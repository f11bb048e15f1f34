"""Quantization-aware training: what a training step and whoever measures it are handed.

The step computes with matrices and activations on the levels of the run's scheme, and its gradient
goes straight through to the float parameters, which are what is trained and saved. What is
validated and sampled is the quantized model that they stand for, in integers.
"""

import functools
from collections.abc import Callable

import jax

from mobilellm_jax.config import Config
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.quantize.parameters import on_levels, quantized
from mobilellm_jax.quantize.schemes import trained_scheme


def training_transform(config: Config) -> Callable[[Params], Params]:
    """Returns what the step does to the parameters before the model sees them; mostly nothing."""
    scheme = trained_scheme(config)
    return functools.partial(on_levels, scheme=scheme) if scheme else lambda params: params


def derivation(config: Config) -> Callable[[Params], Params]:
    """Returns the function from a run's parameters to those of the model that it is to become."""
    scheme = trained_scheme(config)
    return jax.jit(functools.partial(quantized, scheme=scheme)) if scheme else lambda params: params
