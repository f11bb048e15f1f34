"""Quantization-aware training: functions of the parameters for the training step and validation.

The step computes with matrices and activations that are rounded to the levels of the run's scheme.
Its gradient passes straight through the rounding to the float parameters, which the run trains and
saves. Validation and samples use the quantized model in integers.
"""

import functools
from collections.abc import Callable

import jax

from mobilellm_jax.config import Config
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.quantize.parameters import on_levels, quantized
from mobilellm_jax.quantize.schemes import trained_scheme


def training_transform(config: Config) -> Callable[[Params], Params]:
    """Returns the function that the step applies to the parameters before the model.

    It is the identity if the run is trained for no scheme.
    """
    scheme = trained_scheme(config)
    return functools.partial(on_levels, scheme=scheme) if scheme else lambda params: params


def derivation(config: Config) -> Callable[[Params], Params]:
    """Returns the function from a run's parameters to the parameters of its quantized model.

    It is the identity if the run is trained for no scheme.
    """
    scheme = trained_scheme(config)
    return jax.jit(functools.partial(quantized, scheme=scheme)) if scheme else lambda params: params
