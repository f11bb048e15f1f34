"""Keeps a model's answers on disk, so that a killed evaluation continues where it stopped.

The first line of the file identifies the model. Each further line holds the key of a request and
its answer. The key is a hash of the token ids and settings of the request, so two tasks with equal
requests share an answer. Lines are written one batch at a time. If the process was killed while it
wrote a line, the request of this line is computed again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mobilellm_jax.config import COMPUTATION, ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.model.on_device import compute_dtype
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.rundir import write_whole

_FORMAT = 1


def identity(
    config: ModelConfig, params: Params, tokenizer: Tokenizer, quantized: str | None = None
) -> dict[str, Any]:
    """Returns the fields by which a journal recognises its model.

    `quantized` is one of the fields, because quantizing the activations to 8 bits changes the
    answers but no weight.
    """
    fields = dataclasses.asdict(config)
    return {
        **({"quantized": quantized} if quantized else {}),
        "format": _FORMAT,
        "model": {name: fields[name] for name in fields if name not in COMPUTATION},
        "weights": _fingerprint(params),
        "tokenizer": tokenizer.sha256,
        "compute_dtype": str(compute_dtype(config)),
    }


def key(kind: str, *parts: Any) -> str:
    """Returns the key of a request: a hash of its kind and its parts as JSON."""
    return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:32]


class Journal:
    """A model's answers by key, in memory and in the file `path` (None: only in memory).

    `whose` holds the fields that identify the model. If the file belongs to another model, the
    answers in the file are deleted.
    """

    def __init__(self, path: Path | None, whose: Mapping[str, Any]) -> None:
        self._path = path
        self.answers: dict[str, Any] = {}
        self.replaced = False  # Whether the file held answers of another model.
        if path is None:
            return
        first = json.dumps(whose)
        # A last line without a line end is incomplete.
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        if lines and lines[0] == first.encode():
            self.answers = dict(filter(None, map(_answer, lines[1:])))
        else:
            self.replaced = bool(lines)
        write_whole(path, f"{first}\n{_lines(self.answers)}")

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Adds the answers of a batch to the memory, and then appends them to the file."""
        new = dict(answers)
        self.answers |= new
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_lines(new))

    def remove(self) -> None:
        """Deletes the file; call this when the evaluation is finished."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _lines(answers: Mapping[str, Any]) -> str:
    return "".join(f"{json.dumps(answer)}\n" for answer in answers.items())


def _answer(line: bytes) -> tuple[str, Any] | None:
    """Returns the key and the answer in a line, or None if the line is damaged.

    The answer is either a text or, for a continuation, the pair (log-likelihood, is_greedy).
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
    """Returns a hash of all weights; the devices that hold the weights compute it.

    The hash is built from sums of integers. The order of the terms does not change such a sum, so
    every mesh gives the same hash. Each array has two sums of 32 bits; the second sum also depends
    on the index of each weight. The sums detect accidental changes, but not deliberate ones.
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
    # Multiplication by an odd number modulo 2^32 is invertible, so it loses no bit. The constant is
    # that of Knuth's multiplicative hash; it gives neighbouring weights very different factors.
    mixed = (bits ^ (bits >> 15)) * (place * jnp.uint32(2654435761) | jnp.uint32(1))
    return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(mixed, dtype=jnp.uint32)
