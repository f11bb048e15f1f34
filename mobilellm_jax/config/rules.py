"""The rules of a config that need neither files nor devices."""

import dataclasses
import difflib
import math
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from mobilellm_jax.storage.strict_json import plain, shown

if TYPE_CHECKING:
    from mobilellm_jax.config import Config, ModelConfig

QUANTIZE_PARTS = ("embedding", "head", "attention", "cache")
_WHOLE_NUMBERS = range(-(1 << 31), 1 << 31)  # Integers on the devices have 32 bits.


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRules:
    """Describes what one attention implementation supports. A config must not ask for more."""

    device: str  # Required platform; "" = any platform.
    float32: bool  # Supports float32 besides bfloat16.
    documents: bool  # Supports data.boundaries=document_mask.
    sequence_parallel: bool  # Supports mesh.sequence other than 1.
    length_multiple: int = 1  # Number that must divide data.seq_len.
    head_dim_multiple: int = 1  # Number that must divide model.head_dim.


ATTENTION: Mapping[str, AttentionRules] = {
    "xla": AttentionRules(device="", float32=True, documents=True, sequence_parallel=True),
    "cudnn": AttentionRules(
        device="gpu", float32=False, documents=False, sequence_parallel=False, head_dim_multiple=8
    ),
    "splash": AttentionRules(
        device="tpu", float32=True, documents=True, sequence_parallel=False, length_multiple=128
    ),
    "tokamax": AttentionRules(
        device="gpu", float32=False, documents=True, sequence_parallel=False, head_dim_multiple=8
    ),
}
"""Maps each value of `model.attention` to its rules; only `xla` stores T x T scores."""


def near_miss(name: str, candidates: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' for the candidate closest to `name` in any case, or ''."""
    lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.6)
    return f" Did you mean {lower[close[0]]}?" if close else ""


# Each rule is a test and its error message. The message names every field that the test reads.
# `violations` runs a test only if each field in its message has a valid value, because the test
# could fail on a value of the wrong type.
_RULES: tuple[tuple[Callable[["Config"], bool], str], ...] = (
    (
        lambda c: c.model.scan_unroll <= c.model.num_blocks,
        "model.scan_unroll={model.scan_unroll} must be at most "
        "model.num_blocks={model.num_blocks}.",
    ),
    (
        lambda c: c.model.rope_scaling != "none" or c.model.rope_factor == 1,
        "model.rope_factor={model.rope_factor} has no effect, because "
        "model.rope_scaling={model.rope_scaling!r}; set it to linear or llama3.",
    ),
    (
        lambda c: c.model.rope_low_freq_factor < c.model.rope_high_freq_factor,
        "model.rope_low_freq_factor={model.rope_low_freq_factor} must be less than "
        "model.rope_high_freq_factor={model.rope_high_freq_factor}.",
    ),
    (
        lambda c: c.data.seq_len <= c.model.max_seq_len,
        "data.seq_len={data.seq_len} must be at most model.max_seq_len={model.max_seq_len}; "
        "shorten the windows or raise model.max_seq_len.",
    ),
    (
        lambda c: c.train.global_batch % c.train.accumulation_steps == 0,
        "train.global_batch={train.global_batch} must be a multiple of "
        "train.accumulation_steps={train.accumulation_steps}.",
    ),
    (
        lambda c: c.optimizer.warmup_steps < c.train.steps,
        "optimizer.warmup_steps={optimizer.warmup_steps} must be less than "
        "train.steps={train.steps}; shorten the warm-up or train longer.",
    ),
    (
        lambda c: not c.evaluate.tasks or c.evaluate.every > 0,
        "evaluate.tasks={evaluate.tasks!r} has no effect, because "
        "evaluate.every={evaluate.every}; set --config.evaluate.every to a number of steps.",
    ),
    (
        lambda c: not c.evaluate.text or c.evaluate.every > 0,
        "evaluate.text={evaluate.text!r} has no effect, because "
        "evaluate.every={evaluate.every}; set --config.evaluate.every to a number of steps.",
    ),
)


def violations(config: Any, values: Mapping[str, Any], types: Mapping[str, Any]) -> Iterator[str]:
    """Yields a message for each wrong value, and for each broken rule whose fields are all valid.

    `config` is a `Config` or an object with some of its groups. The keys of `values` and `types`
    are the dotted names of their fields; the types include their limits.
    """
    valid = set()
    for name, value in values.items():
        if problem := _problem(value, types[name]):
            yield f"{name}={shown(value)} must {problem}"
        else:
            valid.add(name)
    for holds, message in _RULES:
        reads = {name for _, name, _, _ in string.Formatter().parse(message) if name}
        if reads <= valid and not holds(config):
            yield message.format_map(vars(config))
    for fields, broken in _LONGER_RULES:
        if valid.issuperset(fields):
            yield from broken(config)


def _problem(value: Any, limited: Any) -> str:
    """Returns the rule that `value` breaks, as the end of a message; "" if it breaks none."""
    expected, *limits = get_args(limited) if get_origin(limited) is Annotated else [limited]
    if get_origin(expected) is Literal:
        choices = get_args(expected)
        if value in choices:
            return ""
        hint = near_miss(value, choices) if isinstance(value, str) else ""
        return f"be one of {', '.join(choices)}.{hint}"
    if type(value) is not expected:
        found = "None" if value is None else type(value).__name__
        return f"be of type {expected.__name__}, not {found}."
    if expected is int and value not in _WHOLE_NUMBERS:
        return f"fit 32 bits: at most {_WHOLE_NUMBERS[-1]:,}."
    if expected is float and not math.isfinite(value):
        return "be a finite number."
    if limits:
        rule, holds = limits
        return "" if holds(value) else f"be {rule}."
    return ""


def _group_violations(config: "Config") -> Iterator[str]:
    heads, kv_heads = config.model.num_heads, config.model.num_kv_heads
    if heads % kv_heads:
        low = [d for d in range(1, math.isqrt(heads) + 1) if heads % d == 0]
        choices = ", ".join(map(str, sorted({*low, *(heads // d for d in low)})))
        yield (
            f"model.num_heads={heads} must be a multiple of model.num_kv_heads={kv_heads}; choose "
            f"num_kv_heads from {choices}."
        )


def _head_dim_violations(config: "Config") -> Iterator[str]:
    width = config.model.head_dim
    if width % 2:
        yield (
            f"model.head_dim={width} must be even, because RoPE rotates pairs; choose "
            f"{width - 1 or 2} or {width + 1}."
        )


def _quantize_violations(config: "Config") -> Iterator[str]:
    parts = config.quantize.parts
    if config.quantize.scheme == "none":
        return
    yield from part_violations("quantize.parts", parts)
    yield from tied_violations("quantize.parts", parts, config.model)
    if "attention" in quantize_parts(parts):
        yield (
            f"quantize.parts={parts!r}: attention is not trained in 8 bits; leave it out, and name "
            "it when the model is evaluated."
        )


def _mesh_violations(config: "Config") -> Iterator[str]:
    free = [f"mesh.{axis}" for axis, size in vars(config.mesh).items() if size == -1]
    if len(free) > 1:
        yield f"{' and '.join(free)} are -1, but only one mesh axis can take what is left."


def attention_violations(config: "Config", name: str) -> Iterator[str]:
    """Yields one message per setting that the implementation `name` does not support."""
    model, data = config.model, config.data
    if name == "auto":
        return
    rules = ATTENTION[name]
    field = f"model.attention={name!r}"

    def able(holds: Callable[[AttentionRules], bool]) -> str:
        return ", ".join(n for n, r in ATTENTION.items() if holds(r))

    if data.boundaries == "document_mask" and not rules.documents:
        yield (
            "data.boundaries='document_mask' needs attention that keeps documents apart, and "
            f"{field} does not; choose {able(lambda r: r.documents)} or auto, or "
            "--config.data.boundaries=concat."
        )
    if model.compute_dtype == "float32" and not rules.float32:
        yield (
            f"{field} takes bfloat16 only, and model.compute_dtype='float32'; choose "
            f"{able(lambda r: r.float32)} or auto, or --config.model.compute_dtype=bfloat16."
        )
    if config.mesh.sequence != 1 and not rules.sequence_parallel:
        yield (
            f"{field} cannot split a sequence over devices, and "
            f"mesh.sequence={config.mesh.sequence}; choose {able(lambda r: r.sequence_parallel)} "
            "or auto, or --config.mesh.sequence=1."
        )
    if data.seq_len % rules.length_multiple:
        yield (
            f"data.seq_len={data.seq_len} must be a multiple of {rules.length_multiple} for "
            f"{field}; choose xla or auto, or other windows."
        )
    if model.head_dim % rules.head_dim_multiple:
        yield (
            f"model.head_dim={model.head_dim} must be a multiple of {rules.head_dim_multiple} for "
            f"{field}; choose xla or auto."
        )


def part_violations(field: str, parts: str) -> Iterator[str]:
    """Yields one message for each name that is not in `QUANTIZE_PARTS`."""
    for part in quantize_parts(parts):
        if part not in QUANTIZE_PARTS:
            yield (
                f"{field}={parts!r}: {plain(part)} must be one of {', '.join(QUANTIZE_PARTS)}."
                + near_miss(part, QUANTIZE_PARTS)
            )


def tied_violations(field: str, parts: str, model: "ModelConfig") -> Iterator[str]:
    """Yields a message if a model is tied and `parts` has only one of `embedding` and `head`."""
    chosen = quantize_parts(parts)
    if model.tie_embeddings is True and ("embedding" in chosen) != ("head" in chosen):
        yield (
            f"{field}={parts!r}: embedding and head are one matrix of this model "
            "(model.tie_embeddings=True); name both or neither."
        )


def quantize_parts(parts: str) -> tuple[str, ...]:
    """Splits a list of names at its commas."""
    return tuple(part.strip() for part in parts.split(",") if part.strip())


_LONGER_RULES: tuple[tuple[tuple[str, ...], Callable[["Config"], Iterator[str]]], ...] = (
    (("model.num_heads", "model.num_kv_heads"), _group_violations),
    (("model.head_dim",), _head_dim_violations),
    (
        (
            *("model.attention", "model.head_dim", "model.compute_dtype"),
            *("data.seq_len", "data.boundaries", "mesh.sequence"),
        ),
        lambda config: attention_violations(config, config.model.attention),
    ),
    (("quantize.scheme", "quantize.parts", "model.tie_embeddings"), _quantize_violations),
    (("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence"), _mesh_violations),
)
"""The other rules: fields that must be valid, and a function that yields the messages."""
