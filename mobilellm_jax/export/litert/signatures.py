"""The signatures of `model.tflite`, which the writer makes and the runtime calls.

`decode` reads one token, and `prefill` reads a chunk. All shapes are fixed, so attention reads all
rows of the cache. `decode_256` and `prefill_256` read only the first 256 rows, for shorter
sequences.
"""

import math

from mobilellm_jax.config import ModelConfig

CHUNK = 128
_SPAN = 256


def capacity(config: ModelConfig) -> int:
    """Returns the number of rows of the cache, which is a whole number of chunks.

    LiteRT would move the last chunk to a position where it fits.
    """
    chunk = min(CHUNK, config.max_seq_len)
    return math.ceil(config.max_seq_len / chunk) * chunk


def signatures(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns the number of tokens and of rows that each signature reads, by name."""
    rows, found = capacity(config), {}
    for suffix, span in {"": rows, f"_{_SPAN}": _SPAN}.items():
        if not suffix or span < rows:
            found[f"decode{suffix}"] = (1, span)
            found[f"prefill{suffix}"] = (min(CHUNK, rows), span)
    return found


def cache_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the cache; every applied layer has keys and values."""
    shape = (1, config.num_kv_heads, capacity(config), config.head_dim)
    return {
        f"{kind}_{i}": shape for i in range(config.applied_depth) for kind in ("keys", "values")
    }
