"""The settings of a run: frozen dataclasses with defaults and rules.

The defaults are MobileLLM-125M and its recipe (Liu et al. 2024, arXiv:2402.14905, Table 9 and
Sec. 3.1). Only `configs/*.py` and the command line use a `ConfigDict`; `from_config_dict` turns it
into a `Config` and lists all broken rules together. `preflight.py` checks the rules that need files
or devices.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.strict_json import plain, shown

Sharing = Literal["immediate", "repeat_all", "reverse"]
Activation = Literal["swiglu", "relu", "gelu"]
Remat = Literal["none", "dots", "attention", "full", "offload"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "xla", "cudnn", "splash", "tokamax"]
Boundaries = Literal["concat", "document_mask"]
OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd", "constant"]
QuantizeScheme = Literal[
    "none", "w8a8", "w8", "w8g32", "w8g128", "w4", "w4g32", "w4g128", "w4a8", "w4a8g32", "w4a8g128"
]
QUANTIZE_PARTS = ("embedding", "head", "attention", "cache")


class ConfigError(UserError):
    """A setting breaks a rule; the message names the field, its value, the rule and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRules:
    """The limits of an implementation of attention; a config beyond them is refused."""

    device: str  # required platform; "" = any platform
    float32: bool  # accepts float32 besides bfloat16
    documents: bool  # supports data.boundaries=document_mask
    sequence_parallel: bool  # supports mesh.sequence other than 1
    length_multiple: int = 1  # data.seq_len must be a multiple of this number
    head_dim_multiple: int = 1  # model.head_dim must be a multiple of this number


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
"""The implementations by the name in `model.attention`; only `xla` stores T x T scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. Applied depth is `num_blocks * num_repeats` (paper Sec. 2.5)."""

    vocab_size: int = 32_000  # number of tokens, at least 1; must equal the data's vocabulary
    embed_dim: int = 576  # width of the residual stream, at least 1
    num_blocks: int = 30  # number of blocks with different weights, at least 1
    num_repeats: int = 1  # uses of each block per token (layer sharing); 1 = no sharing
    sharing: Sharing = "immediate"  # order of the repeats: 1122, 1212 (repeat_all), 1221 (reverse)
    num_heads: int = 9  # number of query heads; a multiple of num_kv_heads
    num_kv_heads: int = 3  # number of key and value heads, at least 1
    head_dim: int = 64  # width of a head; an even number, independent of embed_dim
    ffn_dim: int = 1536  # hidden width of the feed-forward layer, at least 1
    activation: Activation = "swiglu"  # swiglu uses three matrices, relu and gelu use two
    tie_embeddings: bool = True  # the output matrix is the embedding table (paper Sec. 2.3)
    max_seq_len: int = 2048  # longest supported sequence in tokens, at least 1
    rope_theta: float = 10_000.0  # base of the rotary angles, greater than 0
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm, greater than 0
    init_std: float = 0.02  # standard deviation of initial matrices; narrow models need more
    attention: Attention = "auto"  # a name in ATTENTION; auto: the first that fits the device
    # Values that a block keeps for the backward pass; the block computes other values again.
    # none: all values; dots: attention and wide matrix products; attention: attention only;
    # full: the block's input only; offload: the block's input, in the memory of the host.
    remat: Remat = "none"
    scan_unroll: int = 1  # blocks per iteration of the layer loop, 1 to num_blocks (no loop)
    compute_dtype: ComputeDtype = "auto"  # type of activations; parameters are float32

    @property
    def applied_depth(self) -> int:
        """The number of blocks that a token passes through, with repeats."""
        return self.num_blocks * self.num_repeats


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data and its windows."""

    path: str = ""  # a folder of `prepare`, or a mixture of folders: DIR:0.7,DIR:0.3
    source: str = ""  # source for `prepare` if `path` is missing; "" = report an error instead
    seq_len: int = 2048  # targets per window, 1 to model.max_seq_len
    boundaries: Boundaries = "concat"  # document_mask: a token sees its own document only
    verify: bool = True  # compare checksums of all data at every start; reads all data once
    seed: int = 0  # seed of the order of the windows, at least 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule; weight decay is decoupled and acts on matrices only."""

    name: OptimizerName = "adamw"  # muon: Muon for the matrices of blocks, AdamW for the rest
    peak_lr: float = 2e-3  # highest learning rate, greater than 0; not scaled with the batch
    schedule: Schedule = "cosine"  # wsd: constant, then a linear fall over the last fifth
    warmup_steps: int = 1000  # steps of linear growth from 0; less than train.steps
    min_lr_ratio: float = 0.1  # final learning rate divided by peak_lr, 0 to 1
    beta1: float = 0.9  # decay of the mean gradient, at least 0 and less than 1
    beta2: float = 0.95  # decay of the mean squared gradient, at least 0 and less than 1
    eps: float = 1e-8  # added to the denominator of the update, greater than 0
    weight_decay: float = 0.1  # decay of matrices and embeddings, at least 0; norms have no decay
    clip_norm: float = 1.0  # largest global gradient norm; 0 = no limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and intervals of a run; intervals are in optimizer steps."""

    steps: int = 480_000  # number of optimizer steps, at least 1
    global_batch: int = 1024  # sequences per optimizer step on all devices together, at least 1
    accumulation_steps: int = 1  # micro-batches per step; divides global_batch
    init_from: str = ""  # a checkpoint with the initial parameters; "" = random parameters
    log_every: int = 10  # steps between records of the training loss, at least 1
    eval_every: int = 1000  # steps between validations; also at the start and end; 0 = never
    eval_batches: int = 0  # batches per validation; 0 = the whole validation split
    checkpoint_every: int = 1000  # steps between checkpoints, at least 1
    keep_checkpoints: int = 3  # number of newest checkpoints to keep, at least 1
    keep_every: int = 0  # keep checkpoints at multiples of this number of steps; 0 = off
    max_bad_steps: int = 10  # consecutive steps with nan or inf before the run goes back or ends
    # The optimizer skips a step if the loss or gradient norm is this number of standard deviations
    # above the mean of the last 128 steps; 6 is a common choice; 0 = never.
    spike_factor: float = 0.0
    loss_chunk: int = 4096  # tokens per device with logits in memory together, at least 1
    deterministic: bool = False  # make GPUs repeat results exactly, which costs some speed
    seed: int = 0  # seed of initialisation and sampling, at least 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation during training besides the validation loss."""

    every: int = 0  # steps between evaluations; 0 = never
    samples: int = 2  # number of texts to sample into samples.txt, at least 0
    tasks: str = ""  # tasks of lm-evaluation-harness, separated by commas; "" = no tasks
    limit: int = 0  # largest number of rows per task; 0 = all rows
    data_dir: str = ""  # folder of task data, as in `evaluate --data_dir`; "" = download
    text: str = ""  # a text file to measure the loss on; "" = no file


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis of a slice; one axis may be -1, for all remaining devices."""

    data: int = -1  # splits the batch and copies the parameters
    fsdp: int = 1  # splits the batch and the parameters
    tensor: int = 1  # splits heads, feed-forward and vocabulary
    sequence: int = 1  # splits the tokens of a sequence
    dcn_data: int = 1  # number of slices; splits the batch over them and copies the parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Quantization-aware training: the step rounds matrices and activations to integer levels."""

    scheme: QuantizeScheme = "none"  # a scheme in quantize/schemes.py; none = floating point
    parts: str = "embedding,head"  # names in QUANTIZE_PARTS, added to the matrices of blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The complete config of a run; the constructor checks all rules."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mesh: MeshConfig = MeshConfig()
    quantize: QuantizeConfig = QuantizeConfig()

    def __post_init__(self) -> None:
        violations = [*_type_violations(self), *_rule_violations(self)]
        if violations:
            raise ConfigError("\n".join(violations))


def to_config_dict(config: Config | None = None) -> ConfigDict:
    """Returns `config`, or the defaults, as a `ConfigDict` with fixed keys for `configs/*.py`."""
    return ConfigDict(dataclasses.asdict(config or Config())).lock()


def from_config_dict(config_dict: ConfigDict) -> Config:
    """Returns the checked `Config`.

    Raises:
      ConfigError: listing all unknown keys, wrong types and broken rules.
    """
    return _from_mapping(config_dict.to_dict())


def to_json(config: Config) -> str:
    """Returns the complete config as indented JSON; `from_json` is its inverse."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Returns the checked `Config` in the text of a `config.json`.

    Raises:
      ConfigError: if the text is not a JSON object, or as in `from_config_dict`.
    """
    try:
        values = strict_json.parse(text)
    except strict_json.JsonError as error:
        raise ConfigError(f"config.json: {error}") from error
    return _from_object(values, "config.json")


def read_json(file: Path) -> Config:
    """Returns the checked `Config` in a `config.json`.

    Raises:
      MissingFileError: if the file is missing.
      ConfigError: as in `from_json`.
    """
    try:
        values = strict_json.read(file)
    except strict_json.JsonError as error:
        raise ConfigError(str(error)) from error
    return _from_object(values, str(file))


def near_miss(name: str, candidates: typing.Iterable[str]) -> str:
    """Returns ' Did you mean ...?' for the candidate closest to `name`, or ''."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def changed_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {dotted field: (old value, new value)} for every field that differs."""
    old_flat, new_flat = dict(_fields(old)), dict(_fields(new))
    return {k: (old_flat[k], new_flat[k]) for k in old_flat if old_flat[k] != new_flat[k]}


def field_types() -> dict[str, Any]:
    """Returns {dotted field: annotated type} for every field of `Config`."""
    groups = typing.get_type_hints(Config)
    return {
        f"{group}.{name}": hint
        for group, cls in groups.items()
        for name, hint in typing.get_type_hints(cls).items()
    }


def _fields(config: Config) -> Iterator[tuple[str, Any]]:
    for group in dataclasses.fields(config):
        node = getattr(config, group.name)
        for field in dataclasses.fields(node):
            yield f"{group.name}.{field.name}", getattr(node, field.name)


def _from_object(values: Any, where: str) -> Config:
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold an object, not {type(values).__name__}.")
    return _from_mapping(values)


def _from_mapping(values: Mapping[str, Any]) -> Config:
    hints = typing.get_type_hints(Config)
    known = [*hints, *field_types()]
    violations: list[str] = []
    groups: dict[str, Any] = {}
    for group, entries in values.items():
        if group not in hints:
            violations.append(f"{plain(group)}: unknown config group.{near_miss(group, known)}")
            continue
        if not isinstance(entries, Mapping):
            violations.append(f"{group}={shown(entries)} must be a group of fields.")
            continue
        names = {f.name for f in dataclasses.fields(hints[group])}
        for name in entries:
            if name not in names:
                dotted = f"{group}.{plain(name)}"
                violations.append(f"{dotted}: unknown config key.{near_miss(dotted, known)}")
        accepted = {k: _as_annotated(hints[group], k, v) for k, v in entries.items() if k in names}
        groups[group] = hints[group](**accepted)
    try:
        config = Config(**groups)
    except ConfigError as error:
        raise ConfigError("\n".join([*violations, str(error)])) from None
    if violations:
        raise ConfigError("\n".join(violations))
    return config


def _as_annotated(cls: type, name: str, value: Any) -> Any:
    """Returns an int as a float if the field is a float, because JSON writes 1 for 1.0."""
    whole = typing.get_type_hints(cls)[name] is float and type(value) is int
    # An int without an exact float stays an int, and the type check refuses it.
    return float(value) if whole and abs(value) <= 1 << 53 else value


def _type_violations(config: Config) -> Iterator[str]:
    types_of = field_types()
    for dotted, value in _fields(config):
        expected = types_of[dotted]
        if typing.get_origin(expected) is Literal:
            choices = get_args(expected)
            if value not in choices:
                yield f"{dotted}={shown(value)} must be one of {', '.join(choices)}." + (
                    near_miss(value, choices) if isinstance(value, str) else ""
                )
        elif type(value) is not expected:
            yield (
                f"{dotted}={shown(value)} must be of type {expected.__name__}, not {_name(value)}."
            )
        elif expected is int and value not in _WHOLE_NUMBERS:
            yield f"{dotted}={shown(value)} must fit 32 bits: at most {_WHOLE_NUMBERS[-1]:,}."
        elif expected is float and not math.isfinite(value):
            yield f"{dotted}={value} must be a finite number."


def _name(value: Any) -> str:
    return "None" if isinstance(value, types.NoneType) else type(value).__name__


def attention_violations(config: Config, name: str) -> Iterator[str]:
    """Yields one message per demand of the config that attention `name` cannot meet."""
    model, data = config.model, config.data
    # "auto" has no limits, and the type check refuses unknown names.
    rules = ATTENTION.get(name) if isinstance(name, str) else None
    if rules is None:
        return
    field = f"model.attention={name!r}"

    def able(holds: typing.Callable[[AttentionRules], bool]) -> str:
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


def tied_violations(field: str, parts: str, model: ModelConfig) -> Iterator[str]:
    """Yields a message if `parts` names only one of `embedding` and `head` of a tied model."""
    chosen = quantize_parts(parts)
    if model.tie_embeddings is True and ("embedding" in chosen) != ("head" in chosen):
        yield (
            f"{field}={parts!r}: embedding and head are one matrix of this model "
            "(model.tie_embeddings=True); name both or neither."
        )


def quantize_parts(parts: str) -> tuple[str, ...]:
    """Returns the names in a list separated by commas."""
    return tuple(part.strip() for part in parts.split(",") if part.strip())


# Devices count with 32 bits.
_WHOLE_NUMBERS = range(-(1 << 31), 1 << 31)
_AT_LEAST_ONE = (
    *("model.vocab_size", "model.embed_dim", "model.num_blocks", "model.num_repeats"),
    *("model.num_heads", "model.num_kv_heads", "model.head_dim", "model.ffn_dim"),
    *("model.max_seq_len", "model.scan_unroll", "data.seq_len"),
    *("train.steps", "train.global_batch", "train.accumulation_steps", "train.log_every"),
    *("train.checkpoint_every", "train.keep_checkpoints", "train.max_bad_steps"),
    *("train.loss_chunk", "mesh.dcn_data"),
)
_NOT_NEGATIVE = (
    "train.spike_factor",
    *("data.seed", "train.seed", "optimizer.warmup_steps", "optimizer.weight_decay"),
    *("optimizer.clip_norm", "train.eval_every", "train.eval_batches", "train.keep_every"),
    *("evaluate.every", "evaluate.samples", "evaluate.limit"),
)
_POSITIVE = (
    "model.rope_theta",
    "model.norm_eps",
    "model.init_std",
    "optimizer.peak_lr",
    "optimizer.eps",
)


class _Rules:
    """Knows the fields of a config that have a value of the right type."""

    def __init__(self, config: Config) -> None:
        self._value, hints = dict(_fields(config)), field_types()
        self._sound = {
            name
            for name, value in self._value.items()
            if type(value) is hints[name]
            and not (hints[name] is int and value not in _WHOLE_NUMBERS)
            and not (hints[name] is float and not math.isfinite(value))
        }

    def usable(self, *names: str) -> bool:
        """Returns whether rules between these fields make sense."""
        return all(
            n in self._sound and (n not in _AT_LEAST_ONE or self._value[n] >= 1) for n in names
        )

    def broken(
        self, names: tuple[str, ...], holds: typing.Callable[[Any], bool], rule: str
    ) -> list[str]:
        """Returns one message for each field that breaks a rule about one number."""
        wrong = [n for n in names if n in self._sound and not holds(self._value[n])]
        return [f"{n}={self._value[n]!r} must be {rule}." for n in wrong]


def _rule_violations(config: Config) -> Iterator[str]:
    """Yields one message per broken rule; `_type_violations` reports values of a wrong type."""
    rules = _Rules(config)
    yield from rules.broken(_AT_LEAST_ONE, lambda v: v >= 1, "at least 1")
    yield from rules.broken(_NOT_NEGATIVE, lambda v: v >= 0, "at least 0")
    yield from rules.broken(_POSITIVE, lambda v: v > 0, "greater than 0")
    yield from rules.broken(("optimizer.min_lr_ratio",), lambda v: 0 <= v <= 1, "between 0 and 1")
    betas = ("optimizer.beta1", "optimizer.beta2")
    yield from rules.broken(betas, lambda v: 0 <= v < 1, "at least 0 and less than 1")
    yield from _model_violations(config, rules)
    yield from _quantize_violations(config, rules)
    yield from _training_violations(config, rules)
    yield from _mesh_violations(config, rules)


def _model_violations(config: Config, rules: _Rules) -> Iterator[str]:
    model, data = config.model, config.data
    if (
        rules.usable("model.num_heads", "model.num_kv_heads")
        and model.num_heads % model.num_kv_heads
    ):
        heads = model.num_heads
        low = [d for d in range(1, math.isqrt(heads) + 1) if heads % d == 0]
        choices = ", ".join(map(str, sorted({*low, *(heads // d for d in low)})))
        yield (
            f"model.num_heads={model.num_heads} must be a multiple of "
            f"model.num_kv_heads={model.num_kv_heads}; choose num_kv_heads from {choices}."
        )
    if rules.usable("model.head_dim") and model.head_dim % 2:
        yield (
            f"model.head_dim={model.head_dim} must be even, because RoPE rotates pairs; "
            f"choose {model.head_dim - 1 or 2} or {model.head_dim + 1}."
        )
    if (
        rules.usable("model.scan_unroll", "model.num_blocks")
        and model.scan_unroll > model.num_blocks
    ):
        yield (
            f"model.scan_unroll={model.scan_unroll} must be at most "
            f"model.num_blocks={model.num_blocks}."
        )
    if rules.usable("data.seq_len", "model.max_seq_len") and data.seq_len > model.max_seq_len:
        yield (
            f"data.seq_len={data.seq_len} must be at most model.max_seq_len={model.max_seq_len}; "
            "shorten the windows or raise model.max_seq_len."
        )
    if rules.usable("data.seq_len", "model.head_dim", "mesh.sequence"):
        yield from attention_violations(config, model.attention)


def _quantize_violations(config: Config, rules: _Rules) -> Iterator[str]:
    if rules.usable("quantize.parts") and config.quantize.scheme != "none":
        yield from part_violations("quantize.parts", config.quantize.parts)
        yield from tied_violations("quantize.parts", config.quantize.parts, config.model)
        if "attention" in quantize_parts(config.quantize.parts):
            yield (
                f"quantize.parts={config.quantize.parts!r}: attention is not trained in 8 bits; "
                "leave it out, and name it when the model is evaluated."
            )


def _training_violations(config: Config, rules: _Rules) -> Iterator[str]:
    train, optimizer = config.train, config.optimizer
    for name in ("evaluate.tasks", "evaluate.text"):
        value = getattr(config.evaluate, name.removeprefix("evaluate."))
        if rules.usable(name) and value and config.evaluate.every == 0:
            yield (
                f"{name}={value!r} has no effect, because evaluate.every=0; set "
                "--config.evaluate.every to a number of steps."
            )
    if rules.usable("train.global_batch", "train.accumulation_steps") and (
        train.global_batch % train.accumulation_steps
    ):
        yield (
            f"train.global_batch={train.global_batch} must be a multiple of "
            f"train.accumulation_steps={train.accumulation_steps}."
        )
    if (
        rules.usable("optimizer.warmup_steps", "train.steps")
        and optimizer.warmup_steps >= train.steps
    ):
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be less than "
            f"train.steps={train.steps}; shorten the warm-up or train longer."
        )


def _mesh_violations(config: Config, rules: _Rules) -> Iterator[str]:
    axes = ("data", "fsdp", "tensor", "sequence")
    sizes = {f"mesh.{axis}": getattr(config.mesh, axis) for axis in axes}
    if rules.usable(*sizes):
        yield from [
            f"{name}={size} must be at least 1, or -1 for what is left."
            for name, size in sizes.items()
            if size < 1 and size != -1
        ]
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            yield f"{' and '.join(free)} are -1, but only one mesh axis can take what is left."
