"""Every setting of a run: frozen dataclasses, their defaults and the rules they must obey.

The defaults are MobileLLM-125M and its recipe (Liu et al. 2024, arXiv:2402.14905, Table 9 and
Sec. 3.1). A `ConfigDict` exists only at the edge (`configs/*.py` and the command line);
`from_config_dict` turns it into a `Config` once, checks every rule that needs neither a file nor a
device, and lists all violations together. Rules that do need one are in `pretrain.preflight`.
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
    """What an implementation of attention can do; what it cannot is refused, never replaced."""

    device: str  # the only kind it runs on, for `model/on_device.py`; "" = any
    float32: bool  # besides bfloat16
    documents: bool  # keeps those of a window apart, which data.boundaries=document_mask needs
    sequence_parallel: bool  # mesh.sequence other than 1
    length_multiple: int = 1  # divides data.seq_len
    head_dim_multiple: int = 1  # divides model.head_dim


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
"""The implementations that `model.attention` names; all but `xla` keep no T x T scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. Applied depth is `num_blocks * num_repeats` (paper Sec. 2.5)."""

    vocab_size: int = 32_000  # tokens; must equal the tokenizer's
    embed_dim: int = 576  # width of the residual stream
    num_blocks: int = 30  # unique blocks, each with weights of its own
    num_repeats: int = 1  # times each block is applied (layer sharing); 1 = no sharing
    sharing: Sharing = "immediate"  # order of the repeats: 1122, 1212 (repeat_all), 1221 (reverse)
    num_heads: int = 9  # query heads; a multiple of num_kv_heads
    num_kv_heads: int = 3  # key and value heads
    head_dim: int = 64  # even (RoPE rotates pairs); need not be embed_dim / num_heads
    ffn_dim: int = 1536  # hidden width of the feed-forward
    activation: Activation = "swiglu"  # swiglu has three matrices, relu and gelu two
    tie_embeddings: bool = True  # logits from the transposed embedding table (paper Sec. 2.3)
    max_seq_len: int = 2048  # longest sequence in tokens that the model is meant for
    rope_theta: float = 10_000.0  # base of the rotary angles
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    init_std: float = 0.02  # of every matrix at the start; narrow models learn faster from more
    attention: Attention = "auto"  # implementation, see ATTENTION; auto: see model/on_device.py
    # What waits for the backward pass, per block: everything; attention and the wide products;
    # attention; the input alone; the input, in the host's memory. The rest is computed again.
    remat: Remat = "none"
    scan_unroll: int = 1  # blocks per iteration of the scan; num_blocks = no loop at all
    compute_dtype: ComputeDtype = "auto"  # of activations and products; parameters stay float32

    @property
    def applied_depth(self) -> int:
        """Blocks that a token passes through, repeats included."""
        return self.num_blocks * self.num_repeats


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which windows."""

    path: str = ""  # folder that `prepare` wrote, or a mixture of such: DIR:0.7,DIR:0.3
    source: str = ""  # made by `prepare --source=...` when `path` is missing; "" = never
    seq_len: int = 2048  # targets per window; at most model.max_seq_len
    boundaries: Boundaries = "concat"  # document_mask: attention and positions reset per document
    verify: bool = True  # checksums of all data at every start: as long as reading it once takes
    seed: int = 0  # of the window permutation


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update, with decoupled decay on matrices only, and its schedule."""

    name: OptimizerName = "adamw"  # muon: for the blocks' matrices, at AdamW's learning rate
    peak_lr: float = 2e-3  # for 1024 sequences of 2048 tokens; never scaled for you
    schedule: Schedule = "cosine"  # wsd: constant, then linear over the last fifth
    warmup_steps: int = 1000  # linear from 0
    min_lr_ratio: float = 0.1  # final learning rate / peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on every matrix, embeddings included; not on norms
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and rhythm of a run. Intervals are in optimizer steps."""

    steps: int = 480_000
    global_batch: int = 1024  # sequences per optimizer step, over all devices
    accumulation_steps: int = 1  # micro-batches per step; divides global_batch
    init_from: str = ""  # a CKPT whose parameters start the run; "" = random
    log_every: int = 10
    eval_every: int = 1000  # validation loss, also before the first and after the last; 0 = never
    eval_batches: int = 0  # validation batches per evaluation; 0 = the whole split
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3  # newest ones kept
    keep_every: int = 0  # also keep every multiple of this step for good; 0 = none
    max_bad_steps: int = 10  # not finite, in a row (each skipped), before the run goes back or ends
    # A step is skipped if its loss or gradient norm lies so many standard deviations above the mean
    # of the last 128; 6 is usual, 0 = never.
    spike_factor: float = 0.0
    loss_chunk: int = 4096  # tokens per device whose logits exist at once
    deterministic: bool = False  # the same bits from the same start on GPUs too, at some cost
    seed: int = 0  # of initialisation and sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is looked at during training, besides the validation loss."""

    every: int = 0  # steps between looks, after a checkpoint of the same step; 0 = never
    samples: int = 2  # texts sampled into samples.txt
    tasks: str = ""  # of lm-evaluation-harness, or groups, separated by commas
    limit: int = 0  # rows of each task; 0 = all
    data_dir: str = ""  # the tasks' rows, as for `evaluate --data_dir`; "" = they are downloaded
    text: str = ""  # a file whose loss is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis of a slice; exactly one may be -1, meaning what is left."""

    data: int = -1  # batch split, parameters copied
    fsdp: int = 1  # batch split, parameters split too
    tensor: int = 1  # heads, feed-forward and vocabulary split
    sequence: int = 1  # tokens of a sequence split
    dcn_data: int = 1  # slices that only DCN joins; the batch is split over them, parameters copied


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Quantization-aware training: the step computes with matrices and activations on levels."""

    scheme: QuantizeScheme = "none"  # see quantize/schemes.py; none = floating point
    parts: str = "embedding,head"  # of QUANTIZE_PARTS, besides the blocks' matrices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A complete, checked run."""

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
    """Returns the editable, locked form of `config` (the defaults if None) for `configs/*.py`."""
    return ConfigDict(dataclasses.asdict(config or Config())).lock()


def from_config_dict(config_dict: ConfigDict) -> Config:
    """Returns the checked `Config`.

    Raises:
      ConfigError: for unknown keys, wrong types and broken rules, all of them listed.
    """
    return _from_mapping(config_dict.to_dict())


def to_json(config: Config) -> str:
    """Returns the complete config as indented JSON; `from_json` is its inverse."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Returns the checked `Config` of the text of a `config.json`.

    Raises:
      ConfigError: as `from_config_dict`; for text that is not a JSON object too.
    """
    try:
        values = strict_json.parse(text)
    except strict_json.JsonError as error:
        raise ConfigError(f"config.json: {error}") from error
    return _from_object(values, "config.json")


def read_json(file: Path) -> Config:
    """Returns the checked `Config` of a `config.json`.

    Raises:
      MissingFileError: if there is none.
      ConfigError: as `from_json`.
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
    """Returns {dotted field: annotated type} of every leaf of `Config`."""
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
    """An int where a float belongs (JSON and Python both write 1 for 1.0) becomes that float."""
    whole = typing.get_type_hints(cls)[name] is float and type(value) is int
    # One that no float holds exactly stays what it is, and is refused for that.
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
    """Yields what the implementation `name` cannot do that the config asks for, device aside."""
    model, data = config.model, config.data
    # auto is one that can; what is no choice at all, of whatever type, is said elsewhere.
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
    """Yields what among the names is no part of a model."""
    for part in quantize_parts(parts):
        if part not in QUANTIZE_PARTS:
            yield (
                f"{field}={parts!r}: {plain(part)} is none of {', '.join(QUANTIZE_PARTS)}."
                + near_miss(part, QUANTIZE_PARTS)
            )


def tied_violations(field: str, parts: str, model: ModelConfig) -> Iterator[str]:
    """Yields that half of one matrix was named, if it was."""
    chosen = quantize_parts(parts)
    if model.tie_embeddings is True and ("embedding" in chosen) != ("head" in chosen):
        yield (
            f"{field}={parts!r}: embedding and head are one matrix of this model "
            "(model.tie_embeddings=True); name both or neither."
        )


def quantize_parts(parts: str) -> tuple[str, ...]:
    """Returns the names in a list separated by commas."""
    return tuple(part.strip() for part in parts.split(",") if part.strip())


# Of every whole number: what a device counts with, and far more than there is a use for.
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


def _rule_violations(config: Config) -> Iterator[str]:
    """Yields one message per broken rule; values of a wrong type are left to the type check."""
    value = dict(_fields(config))
    types_of = field_types()
    sound = {k for k, v in value.items() if type(v) is types_of[k]}
    sound -= {k for k in sound if types_of[k] is int and value[k] not in _WHOLE_NUMBERS}
    sound -= {k for k in sound if types_of[k] is float and not math.isfinite(value[k])}

    def broken(names: tuple[str, ...], holds: typing.Callable[[Any], bool], rule: str) -> list[str]:
        wrong = [n for n in names if n in sound and not holds(value[n])]
        return [f"{n}={value[n]!r} must be {rule}." for n in wrong]

    yield from broken(_AT_LEAST_ONE, lambda v: v >= 1, "at least 1")
    yield from broken(_NOT_NEGATIVE, lambda v: v >= 0, "at least 0")
    yield from broken(_POSITIVE, lambda v: v > 0, "greater than 0")
    yield from broken(("optimizer.min_lr_ratio",), lambda v: 0 <= v <= 1, "between 0 and 1")
    betas = ("optimizer.beta1", "optimizer.beta2")
    yield from broken(betas, lambda v: 0 <= v < 1, "at least 0 and less than 1")

    model, data, train = config.model, config.data, config.train
    mesh, optimizer = config.mesh, config.optimizer

    def usable(*names: str) -> bool:
        return all(n in sound and (n not in _AT_LEAST_ONE or value[n] >= 1) for n in names)

    if usable("model.num_heads", "model.num_kv_heads") and model.num_heads % model.num_kv_heads:
        heads = model.num_heads
        low = [d for d in range(1, math.isqrt(heads) + 1) if heads % d == 0]
        choices = ", ".join(map(str, sorted({*low, *(heads // d for d in low)})))
        yield (
            f"model.num_heads={model.num_heads} must be a multiple of "
            f"model.num_kv_heads={model.num_kv_heads}; choose num_kv_heads from {choices}."
        )
    if usable("model.head_dim") and model.head_dim % 2:
        yield (
            f"model.head_dim={model.head_dim} must be even, because RoPE rotates pairs; "
            f"choose {model.head_dim - 1 or 2} or {model.head_dim + 1}."
        )
    if usable("model.scan_unroll", "model.num_blocks") and model.scan_unroll > model.num_blocks:
        yield (
            f"model.scan_unroll={model.scan_unroll} must be at most "
            f"model.num_blocks={model.num_blocks}."
        )
    if usable("data.seq_len", "model.max_seq_len") and data.seq_len > model.max_seq_len:
        yield (
            f"data.seq_len={data.seq_len} must be at most model.max_seq_len={model.max_seq_len}; "
            "shorten the windows or raise model.max_seq_len."
        )
    if usable("data.seq_len", "model.head_dim", "mesh.sequence"):
        yield from attention_violations(config, model.attention)
    if usable("quantize.parts") and config.quantize.scheme != "none":
        yield from part_violations("quantize.parts", config.quantize.parts)
        yield from tied_violations("quantize.parts", config.quantize.parts, model)
        if "attention" in quantize_parts(config.quantize.parts):
            yield (
                f"quantize.parts={config.quantize.parts!r}: attention is not trained in 8 bits; "
                "leave it out, and name it when the model is evaluated."
            )
    for name in ("evaluate.tasks", "evaluate.text"):
        if name in sound and value[name] and config.evaluate.every == 0:
            yield (
                f"{name}={value[name]!r} is never looked at, since evaluate.every=0; set "
                "--config.evaluate.every to a number of steps."
            )
    if usable("train.global_batch", "train.accumulation_steps") and (
        train.global_batch % train.accumulation_steps
    ):
        yield (
            f"train.global_batch={train.global_batch} must be a multiple of "
            f"train.accumulation_steps={train.accumulation_steps}."
        )
    if usable("optimizer.warmup_steps", "train.steps") and optimizer.warmup_steps >= train.steps:
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be less than "
            f"train.steps={train.steps}; shorten the warm-up or train longer."
        )
    axes = ("data", "fsdp", "tensor", "sequence")
    sizes = {f"mesh.{axis}": getattr(mesh, axis) for axis in axes}
    if usable(*sizes):
        yield from [
            f"{name}={size} must be at least 1, or -1 for what is left."
            for name, size in sizes.items()
            if size < 1 and size != -1
        ]
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            yield f"{' and '.join(free)} are -1, but only one mesh axis can take what is left."
