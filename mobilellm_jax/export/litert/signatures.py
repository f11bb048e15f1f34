"""Defines the signatures (functions) of `model.tflite` for the writer and the runtime.

`decode` reads one token, and `prefill` reads a chunk of tokens. All shapes are fixed, so attention
reads all rows of the cache, even for a short sequence. For sequences of up to 256 tokens,
`decode_256` and `prefill_256` read only the first 256 rows.
"""

import math

from mobilellm_jax.config import ModelConfig

CHUNK = 128
_SPAN = 256


def capacity(config: ModelConfig) -> int:
    """Returns the number of rows of the cache: max_seq_len, rounded up to whole chunks.

    Without the rounding, a padded last chunk could pass the end of the cache. LiteRT would then
    write the chunk to earlier rows.
    """
    chunk = min(CHUNK, config.max_seq_len)
    return math.ceil(config.max_seq_len / chunk) * chunk


def signatures(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Maps the name of each signature to its number of tokens and number of cache rows."""
    rows, found = capacity(config), {}
    for suffix, span in {"": rows, f"_{_SPAN}": _SPAN}.items():
        if not suffix or span < rows:
            found[f"decode{suffix}"] = (1, span)
            found[f"prefill{suffix}"] = (min(CHUNK, rows), span)
    return found


def cache_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the cache shapes by name: keys and values for each application of a block."""
    shape = (1, config.num_kv_heads, capacity(config), config.head_dim)
    return {
        f"{kind}_{i}": shape for i in range(config.applied_depth) for kind in ("keys", "values")
    }
