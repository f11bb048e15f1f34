"""Help texts and flags that several commands share."""

from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.quantize.schemes import Scheme, find_scheme

CHECKPOINT_HELP = "run folder (latest step), step folder or Hugging Face directory"
QUANTIZE_HELP = (
    "scheme: w8a8, w8, w4 or w4a8; w8 and w4 quantize only the weights. g32 or g128 after the "
    "scheme sets the size of a group (default 32)"
)
PARTS_HELP = (
    "parts that --quantize stores in 8 bits besides the blocks' matrices: embedding, head, "
    "attention (its products) and cache (keys and values), separated by commas (default: "
    "embedding,head)"
)


def chosen_scheme(name: str | None, parts: str | None) -> Scheme | None:
    """Returns the scheme of --quantize and --quantized_parts, or None without --quantize.

    Raises:
      UsageError: if --quantized_parts is given without --quantize.
      ConfigError: if the scheme or a part is unknown.
    """
    if name is None:
        if parts is not None:
            raise UsageError(f"--quantized_parts={parts} goes with --quantize only.")
        return None
    return find_scheme(name) if parts is None else find_scheme(name, parts)
