"""Compares an export with its checkpoint by running the export in its own runtime.

A fixed text is read three times: by the JAX model in float32, by the export in one `read`, and by
the export token by token with its cache. Then the JAX model and the export each generate greedy
tokens after the start of the text.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer, text_ids
from mobilellm_jax.export.formats import Precision
from mobilellm_jax.export.runtime import Runtime, greedy
from mobilellm_jax.generation.generate import Request, generate
from mobilellm_jax.generation.sampling import GREEDY
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.transformer import Params, Transformer

POSITIONS = 256
_PROMPT, _NEW = 32, 64

# The text has many kinds of tokens: prose, names, numbers, code and several scripts.
TEXT = """\
A model that fits into the memory of a phone has to earn every parameter. It is deep rather than
wide, its embeddings serve twice, and a block that was read from memory once is applied again
while it is still at hand. On the 3rd of May 1997, at 10:45, the committee met in Straßburg; 17 of
24 members came, and the minutes were kept by Ms. O'Neill.

"What is the price of two tickets?" she asked. "That depends," he said, "on whether you want to
return." The rain had stopped, the street was empty, and somewhere a radio played a song that
nobody remembered.

def mean(values):
    \"\"\"Return the mean of a list of numbers, or None if the list is empty.\"\"\"
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else None

Water boils at 100 degrees Celsius at sea level and at about 71 degrees on the summit of Mount
Everest, because the pressure of the air is lower there. Plants take in carbon dioxide and give
off oxygen; at night it is the other way round. 東京 is the capital of Japan, Москва that of Russia.
"""


class VerificationError(RuntimeError):
    """An export gives other results than its checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """The differences between an export and its checkpoint."""

    runtime: str
    positions: int
    largest_logit: float  # Largest absolute logit of the JAX model.
    read_error: float  # Largest difference from JAX's logits when one `read` takes the text.
    append_error: float  # Largest difference from JAX's logits when tokens are read one by one.
    greedy_equal: int  # Number of equal greedy tokens before the first difference.
    greedy_tokens: int
    loss: float  # Loss of the export on the text, in nats per token.
    loss_jax: float
    same_ids: bool = True  # Whether the export's own tokenizer gives the text the same ids.

    @property
    def scale(self) -> float:
        return max(1.0, self.largest_logit)

    def lines(self) -> list[str]:
        rise = self.loss - self.loss_jax
        return [
            f"verified in {self.runtime}, {self.positions} positions against JAX in float32:",
            f"  logits read at once: off by {self.read_error:.1e} at most, "
            f"{self.read_error / self.scale:.1e} of the largest ({self.largest_logit:.3g})",
            f"  logits by the cache: off by {self.append_error:.1e} at most, "
            f"{self.append_error / self.scale:.1e} of the largest",
            f"  greedy tokens equal: {self.greedy_equal} of {self.greedy_tokens}",
            f"  loss {self.loss:.5f}, JAX {self.loss_jax:.5f}: {rise:+.5f} nats",
        ]

    def problems(self, allowed: Precision) -> list[str]:
        """Returns a message for each difference that exceeds the bound in `allowed`."""
        found = [] if self.same_ids else ["its tokenizer gives a text other ids"]
        if allowed.logits is not None:
            for kind, error in (("at once", self.read_error), ("by the cache", self.append_error)):
                if not error <= allowed.logits * self.scale:
                    found.append(
                        f"logits read {kind} are off by {error:.3g}, more than "
                        f"{allowed.logits:.0e} x {self.scale:.3g}"
                    )
        if allowed.tokens and self.greedy_equal < self.greedy_tokens:
            found.append(f"greedy token {self.greedy_equal + 1} differs")
        if not self.loss - self.loss_jax <= allowed.loss:
            found.append(
                f"the loss rises by {self.loss - self.loss_jax:.4f} nats, more than {allowed.loss}"
            )
        return found


def verify(runtime: Runtime, source: OpenedModel) -> Verification:
    """Compares an export with its model; raises `VerificationError` if logits differ in shape."""
    config = dataclasses.replace(source.config, compute_dtype="float32", attention="xla")
    room = min(config.max_seq_len, runtime.max_seq_len)
    tokenizer = source.tokenizer
    tokens = text_ids(tokenizer, TEXT)[: min(POSITIONS, room)]
    params = jax.device_put(dict(source.params))
    ours_TV = np.asarray(_logits(params, np.asarray([tokens], np.int32), config))[0]
    read_TV = runtime.read(tokens)
    if read_TV.shape != ours_TV.shape:
        raise VerificationError(
            f"{runtime.name} gives logits of shape {read_TV.shape}, and the model has "
            f"{ours_TV.shape}."
        )
    rows = [runtime.read(tokens[:1])[-1], *(runtime.append(token) for token in tokens[1:])]
    append_TV = np.stack(rows)

    prompt = tokens[: min(_PROMPT, room // 2)]
    count = min(_NEW, room - len(prompt))
    request = Request([prompt], max_new_tokens=count, sampling=GREEDY)
    [ours] = generate(config, params, request)
    theirs = list(greedy(runtime, prompt, count))
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), count)
    return Verification(
        runtime=runtime.name,
        positions=len(tokens),
        largest_logit=float(np.abs(ours_TV).max()),
        read_error=_distance(read_TV, ours_TV),
        append_error=_distance(append_TV, ours_TV),
        greedy_equal=equal,
        greedy_tokens=count,
        loss=_loss(append_TV, tokens),
        loss_jax=_loss(ours_TV, tokens),
        same_ids=_same_ids(runtime, tokenizer),
    )


def _same_ids(runtime: Runtime, tokenizer: Tokenizer) -> bool:
    found = runtime.encode(TEXT)
    return found is None or found == [*text_ids(tokenizer, TEXT), *tokenizer.convention.after]


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    return Transformer(config).bind({"params": params})(tokens_BT)


def _distance(theirs: NDArray[np.float32], ours: NDArray[np.float32]) -> float:
    """Returns the largest absolute difference, or infinity if a value is NaN."""
    difference = np.abs(theirs - ours)
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


def _loss(logits_TV: NDArray[np.float32], tokens: list[int]) -> float:
    """Returns the mean cross-entropy of all tokens after the first."""
    log_TV = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_TV[:-1]), axis=-1), np.float64)
    return -float(np.mean(log_TV[np.arange(len(tokens) - 1), tokens[1:]]))
