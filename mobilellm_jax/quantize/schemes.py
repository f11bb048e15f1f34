"""The quantization schemes by name, and the parts of a model that they quantize.

| name              | matrices of the blocks                       | activations        |
|-------------------|----------------------------------------------|--------------------|
| w8a8              | 8 bits, a scale for each output channel      | 8 bits, per token  |
| w8g32, w8g128     | 8 bits, a scale for 32 or 128 inputs         | floating point     |
| w4g32, w4g128     | 4 bits, the same                             | floating point     |
| w4a8g32, w4a8g128 | 4 bits, the same                             | 8 bits, per token  |

w8, w4 and w4a8 are short names for groups of 32. For W8A8, the paper (Sec. 3.4) says neither which
numbers share a scale nor which parts are quantized. Our w8a8 follows LLM-QAT, a paper by the same
first author (Liu et al. 2023, arXiv:2305.17888).

A scheme always quantizes the matrices of the blocks. Under every scheme, the following parts can
also be quantized to 8 bits. The default is `embedding,head`:

| part      | in 8 bits                                                          |
|-----------|--------------------------------------------------------------------|
| embedding | the token table, with one scale for each token                     |
| head      | the output matrix, with one scale for each token                   |
| attention | queries, keys, values and softmax weights in both multiplications  |
| cache     | keys and values, with one scale for each token and head            |

Tied embeddings are one matrix, so a scheme names both `embedding` and `head`, or neither.
"""

import dataclasses
from collections.abc import Iterator

from mobilellm_jax.config import Config, ConfigError, ModelConfig, QuantizeConfig, near_miss
from mobilellm_jax.config.rules import (
    QUANTIZE_PARTS,
    part_violations,
    quantize_parts,
    tied_violations,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a model is quantized."""

    name: str
    weight_bits: int  # Bits per weight of the blocks.
    group_size: int  # Number of inputs that share a scale; 0: all inputs of an output channel.
    integer_products: bool  # Whether activations are quantized to 8 bits too.
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        shared = f"groups of {self.group_size}" if self.group_size else "output channel"
        activations = "8-bit activations per token" if self.integer_products else "weights alone"
        left_out = [part for part in QUANTIZE_PARTS if part not in self.parts]
        return (
            f"{self.name}: matrices of the blocks in {self.weight_bits} bits per {shared}, "
            f"{activations}; in 8 bits: {', '.join(self.parts) or 'nothing else'}; "
            f"not quantized: {', '.join([*left_out, 'norms'])}"
        )


_GROUPED = {
    "w8": (8, False),
    "w4": (4, False),
    "w4a8": (4, True),
}
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="w8a8", weight_bits=8, group_size=0, integer_products=True),
        *(
            Scheme(
                name=f"{name}g{size}", weight_bits=bits, group_size=size, integer_products=integers
            )
            for name, (bits, integers) in _GROUPED.items()
            for size in (32, 128)
        ),
    )
}
ALIASES = {name: f"{name}g32" for name in _GROUPED}


def find_scheme(name: str, parts: str = QuantizeConfig.parts) -> Scheme:
    """Returns a scheme with parts separated by commas; unknown names raise a `ConfigError`."""
    known = [*SCHEMES, *ALIASES]
    if name not in known:
        raise ConfigError(
            f"quantize={name!r} must be one of {', '.join(known)}.{near_miss(name, known)}"
        )
    _refuse(part_violations("quantized_parts", parts))
    chosen = tuple(part for part in QUANTIZE_PARTS if part in quantize_parts(parts))
    return dataclasses.replace(SCHEMES[ALIASES.get(name, name)], parts=chosen)


def check_scheme(scheme: Scheme, model: ModelConfig) -> None:
    """Raises a `ConfigError` if the scheme names only one side of tied embeddings."""
    _refuse(tied_violations("quantized_parts", ",".join(scheme.parts), model))


def trained_scheme(config: Config) -> Scheme | None:
    """Returns the scheme of a quantization-aware run, or None for another run."""
    chosen = config.quantize
    if chosen.scheme == "none":
        return None
    return find_scheme(chosen.scheme, chosen.parts)


def _refuse(violations: Iterator[str]) -> None:
    if messages := list(violations):
        raise ConfigError("\n".join(messages))
