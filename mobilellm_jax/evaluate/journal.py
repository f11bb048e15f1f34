"""Answers of a model that are on disk, so that an evaluation that was killed goes on where it was.

The first line says whose answers they are; every other line is a request's key and its answer.
Requests are told apart by what reaches the model, token ids, so that it does not matter which task
asks. Lines are written a batch at a time; one that a kill cut short is asked again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.model.precision import compute_dtype
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.rundir import write_whole

_FORMAT = 1
# Fields that change how the same numbers are computed.
_NOT_THE_MODEL = ("attention", "init_std", "remat", "scan_unroll", "compute_dtype")


def identity(
    config: ModelConfig, params: Params, tokenizer: Tokenizer, quantized: str | None = None
) -> dict[str, Any]:
    """Returns what tells this model's answers from any other's: shape, weights, tokenizer, type.

    And how it is quantized, since that is not in its weights alone.
    """
    fields = dataclasses.asdict(config)
    return {
        **({"quantized": quantized} if quantized else {}),
        "format": _FORMAT,
        "model": {name: fields[name] for name in fields if name not in _NOT_THE_MODEL},
        "weights": _fingerprint(params),
        "tokenizer": tokenizer.sha256,
        "compute_dtype": str(compute_dtype(config)),
    }


def key(kind: str, *parts: Any) -> str:
    """Returns the key of a request; the parts are what JSON can hold."""
    return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:32]


class Journal:
    """The answers so far, by key.

    Args:
      path: the file. None: answers are kept in memory only.
      whose: the identity of the model that gives them.
    """

    def __init__(self, path: Path | None, whose: Mapping[str, Any]) -> None:
        self._path = path
        self.answers: dict[str, Any] = {}
        self.replaced = False  # whether there was one of another model, which is gone
        if path is None:
            return
        first = json.dumps(whose)
        lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        # What follows the last line end was cut short.
        whole = lines[:-1]
        if whole and whole[0] == first.encode():
            self.answers = dict(filter(None, map(_answer, whole[1:])))
        else:
            self.replaced = bool(whole)
        content = [first, *(json.dumps(answer) for answer in self.answers.items())]
        write_whole(path, "".join(f"{line}\n" for line in content))

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keeps the answers of a batch; they are on disk when this returns."""
        new = dict(answers)
        self.answers |= new
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(answer)}\n" for answer in new.items()))

    def remove(self) -> None:
        """Deletes the file: what it was for is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _answer(line: bytes) -> tuple[str, Any] | None:
    """Returns the key and the answer of a line; None if it is damaged, so that it is asked again.

    An answer is a text, or a log-likelihood and whether it is that of the likeliest tokens.
    """
    try:
        name, answer = strict_json.as_type(
            strict_json.parse(line, non_finite=True), tuple[str, Any]
        )
        if isinstance(answer, list):
            return name, list(strict_json.as_type(answer, tuple[float, bool]))
        return name, strict_json.as_type(answer, str)
    except strict_json.JsonError:
        return None


def _fingerprint(params: Params) -> str:
    """Returns a digest of all weights, computed where they are.

    Sums of integers do not depend on the order, so that any mesh gives the same. Two sums per leaf,
    one with the weights' places: 64 bits, against chance and not against malice.
    """
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    sums = jax.device_get({name: _sums(leaf) for name, leaf in leaves.items()})
    text = json.dumps([[name, [int(s) for s in sums[name]]] for name in sorted(sums)])
    return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def _sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).ravel()
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    # An odd factor per place loses no bit; Knuth's multiplicative hash spreads neighbours.
    mixed = (bits ^ (bits >> 15)) * (place * jnp.uint32(2654435761) | jnp.uint32(1))
    return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(mixed, dtype=jnp.uint32)
