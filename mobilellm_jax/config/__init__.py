"""The settings of a run: frozen dataclasses with defaults and limits.

The defaults are MobileLLM-125M and its recipe (Liu et al. 2024, arXiv:2402.14905, Table 9 and
Sec. 3.1). Only `configs/*.py` and the command line use a `ConfigDict`. The constructors check the
rules of `config/rules.py`, and the error of a complete config lists all broken rules.
`preflight.py` checks the rules that need files or devices.
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, assert_never

from ml_collections import ConfigDict

from mobilellm_jax.config import rules
from mobilellm_jax.config.rules import near_miss as near_miss
from mobilellm_jax.config.synonyms import field_hint
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.strict_json import plain, shown

Sharing = Literal["immediate", "repeat_all", "reverse"]
Activation = Literal["swiglu", "relu", "gelu"]
RopeScaling = Literal["none", "linear", "llama3"]
Remat = Literal["none", "dots", "attention", "full", "offload"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "xla", "cudnn", "splash", "tokamax"]
Boundaries = Literal["concat", "document_mask"]
OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd", "constant"]
QuantizeScheme = Literal[
    "none", "w8a8", "w8", "w8g32", "w8g128", "w4", "w4g32", "w4g128", "w4a8", "w4a8g32", "w4a8g128"
]

_T = TypeVar("_T")

# Number types with limits. Each has the words for the error message, and a test of the value.
Count = Annotated[int, "at least 1", lambda v: v >= 1]
Natural = Annotated[int, "at least 0", lambda v: v >= 0]
AxisSize = Annotated[int, "at least 1, or -1 for what is left", lambda v: v >= 1 or v == -1]
NotNegative = Annotated[float, "at least 0", lambda v: v >= 0]
Positive = Annotated[float, "greater than 0", lambda v: v > 0]
Share = Annotated[float, "between 0 and 1", lambda v: 0 <= v <= 1]
Decay = Annotated[float, "at least 0 and less than 1", lambda v: 0 <= v < 1]


# Fields that say how a model is initialized and computed. The other fields say which model it is.
COMPUTATION = ("attention", "init_std", "remat", "scan_unroll", "compute_dtype")


class ConfigError(UserError):
    """A setting breaks a rule; the message names the field, its value, the rule and the remedy."""


@functools.cache
def _limits(group: type) -> dict[str, Any]:
    """Returns {field: type with its limits} for a group of settings."""
    return typing.get_type_hints(group, include_extras=True)


class _Group:
    """A group of settings; its constructor checks the rules that read only this group.

    So a program that needs no complete `Config` gets the same errors as the command line.
    """

    group = ""  # Name of the group in `Config`.

    def __post_init__(self) -> None:
        # The search for a width makes thousands of groups, so their types are read once.
        hints = _limits(type(self))  # type: ignore[arg-type]  # mypy: a class is not Hashable
        values = {f"{self.group}.{name}": value for name, value in vars(self).items()}
        limited = {f"{self.group}.{name}": hint for name, hint in hints.items()}
        alone = types.SimpleNamespace(**{self.group: self})
        _raise(rules.violations(alone, values, limited))


def _raise(violations: Iterable[str]) -> None:
    """Raises one error that holds all messages, if there is a message."""
    if lines := list(violations):
        raise ConfigError("\n".join(lines))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(_Group):
    """The architecture. A token passes `num_blocks * num_repeats` blocks (paper Sec. 2.5)."""

    vocab_size: Count = 32_000  # Number of tokens; must equal the vocabulary size of the data.
    embed_dim: Count = 576  # Width of the residual stream.
    num_blocks: Count = 30  # Number of blocks with different weights.
    num_repeats: Count = 1  # Number of uses of each block per token (layer sharing); 1 = none.
    sharing: Sharing = "immediate"  # Order of the repeats: 1122, 1212 (repeat_all), 1221 (reverse).
    num_heads: Count = 9  # Number of query heads; must be a multiple of num_kv_heads.
    num_kv_heads: Count = 3  # Number of key and value heads.
    head_dim: Count = 64  # Width of a head; an even number, independent of embed_dim.
    ffn_dim: Count = 1536  # Hidden width of the feed-forward layer.
    activation: Activation = "swiglu"  # Activation; swiglu uses 3 matrices, relu and gelu use 2.
    tie_embeddings: bool = True  # The output matrix is the embedding table (paper Sec. 2.3).
    max_seq_len: Count = 2048  # Longest supported sequence in tokens.
    rope_theta: Positive = 10_000.0  # Base of the rotary angles.
    # Rotations slowed down for a longer context: linear = all pairs; llama3 = only the pairs that
    # make few turns within rope_original_len tokens.
    rope_scaling: RopeScaling = "none"
    rope_factor: Positive = 1.0  # Number that divides the frequency of a slowed pair.
    rope_low_freq_factor: Positive = 1.0  # llama3 divides the frequencies below this many turns.
    rope_high_freq_factor: Positive = 4.0  # llama3 keeps the frequencies above this many turns.
    rope_original_len: Count = 8192  # Context in tokens before the llama3 scaling.
    norm_eps: Positive = 1e-5  # Number added to the mean square in RMSNorm.
    init_std: Positive = 0.02  # Standard deviation of initial matrices; narrow models need more.
    attention: Attention = "auto"  # A name in ATTENTION; auto = the first that fits the device.
    # Values that a block keeps for the backward pass, which computes all other values again:
    # none = all values; dots = the outputs of attention and of wide matmuls; attention = the
    # outputs of attention; full = the block's input; offload = the block's input in host memory.
    remat: Remat = "none"
    scan_unroll: Count = 1  # Blocks per iteration of the layer loop; num_blocks = no loop.
    compute_dtype: ComputeDtype = "auto"  # Data type of activations; parameters are float32.

    group = "model"

    @property
    def wide_matrices(self) -> tuple[str, ...]:
        """Names of the matrices that widen the input of the feed-forward layer."""
        match self.activation:
            case "swiglu":
                return ("gate", "up")
            case "relu" | "gelu":
                return ("up",)
            case _:
                assert_never(self.activation)

    @property
    def applied_depth(self) -> int:
        return self.num_blocks * self.num_repeats


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(_Group):
    """The training data and its windows."""

    path: str = ""  # A folder that `prepare` wrote, or a mixture of folders: DIR:0.7,DIR:0.3.
    source: str = ""  # The source that `prepare` reads if `path` is missing; "" = report an error.
    seq_len: Count = 2048  # Number of targets per window, from 1 to model.max_seq_len.
    boundaries: Boundaries = "concat"  # With document_mask, a token sees only its own document.
    verify: bool = True  # Read all data at every start of the run and compare checksums.
    seed: Natural = 0  # Seed of the order of the windows.

    group = "data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Group):
    """The optimizer and its schedule; weight decay is decoupled and acts on matrices only."""

    name: OptimizerName = "adamw"  # With muon, Muon trains block matrices, and AdamW the rest.
    peak_lr: Positive = 2e-3  # Highest learning rate; it is not scaled with the batch size.
    schedule: Schedule = "cosine"  # With wsd: constant, then linear decay over the last fifth.
    warmup_steps: Natural = 1000  # Steps of linear growth from 0; must be less than train.steps.
    min_lr_ratio: Share = 0.1  # Final learning rate divided by peak_lr.
    beta1: Decay = 0.9  # Decay of the mean gradient.
    beta2: Decay = 0.95  # Decay of the mean squared gradient.
    eps: Positive = 1e-8  # Number added to the denominator of the update.
    weight_decay: NotNegative = 0.1  # Decay of matrices and embeddings; norms have no decay.
    clip_norm: NotNegative = 1.0  # Largest global gradient norm; 0 = no limit.

    group = "optimizer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(_Group):
    """The length, batch size and intervals of a run; intervals are in optimizer steps."""

    steps: Count = 480_000  # Number of optimizer steps.
    global_batch: Count = 1024  # Number of sequences per optimizer step on all devices together.
    accumulation_steps: Count = 1  # Number of micro-batches per step; must divide global_batch.
    init_from: str = ""  # A checkpoint with the initial parameters; "" = random parameters.
    log_every: Count = 10  # Steps between records of the training loss.
    eval_every: Natural = 1000  # Steps between validations; also at the start and end; 0 = never.
    eval_batches: Natural = 0  # Batches per validation; 0 = the whole validation split.
    checkpoint_every: Count = 1000  # Steps between checkpoints.
    keep_checkpoints: Count = 3  # Number of newest checkpoints to keep.
    keep_every: Natural = 0  # Keep checkpoints at multiples of this number of steps; 0 = off.
    # After this number of consecutive steps with nan or inf, the run loads a checkpoint or ends.
    max_bad_steps: Count = 10
    # The optimizer skips a step if the loss or gradient norm is this number of standard deviations
    # above the mean of the last 128 steps; 6 is a common choice; 0 = never.
    spike_factor: NotNegative = 0.0
    loss_chunk: Count = 4096  # Number of tokens per device whose logits are in memory together.
    deterministic: bool = False  # Make GPUs repeat results exactly, which costs some speed.
    seed: Natural = 0  # Seed of initialisation and sampling.

    group = "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_Group):
    """Evaluation during training besides the validation loss."""

    every: Natural = 0  # Steps between evaluations; 0 = never.
    samples: Natural = 2  # Number of texts to sample into samples.txt.
    tasks: str = ""  # Tasks of lm-evaluation-harness, separated by commas; "" = no tasks.
    limit: Natural = 0  # Largest number of rows per task; 0 = all rows.
    data_dir: str = ""  # Folder of task data, as in `evaluate --data_dir`; "" = download.
    text: str = ""  # A text file to measure the loss on; "" = no file.

    group = "evaluate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(_Group):
    """The size of each mesh axis in a slice; one axis may be -1, for all remaining devices."""

    data: AxisSize = -1  # Splits the batch and copies the parameters.
    fsdp: AxisSize = 1  # Splits the batch and the parameters.
    tensor: AxisSize = 1  # Splits heads, feed-forward layers and vocabulary.
    sequence: AxisSize = 1  # Splits the tokens of a sequence.
    dcn_data: Count = 1  # Number of slices; splits the batch over slices and copies the parameters.

    group = "mesh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig(_Group):
    """Quantization-aware training: the step rounds matrices and activations to integer levels."""

    scheme: QuantizeScheme = "none"  # A scheme in quantize/schemes.py; none = floating point.
    parts: str = "embedding,head"  # Names in QUANTIZE_PARTS, in addition to the block matrices.

    group = "quantize"


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
        _raise(_violations(self))

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.data.seq_len

    @property
    def tokens(self) -> int:
        """The number of tokens that the whole training reads."""
        return self.train.steps * self.tokens_per_step


def to_config_dict(config: Config | None = None) -> ConfigDict:
    """Returns `config` or the defaults as a `ConfigDict`, to which no key can be added."""
    return ConfigDict(dataclasses.asdict(config or Config())).lock()


def to_json(config: Config) -> str:
    """Returns the complete config as indented JSON; `from_json` is its inverse."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Returns the checked `Config` of a `config.json`; raises the same errors as `from_object`."""
    try:
        values = strict_json.parse(text)
    except strict_json.JsonError as error:
        raise ConfigError(f"config.json: {error}") from error
    return from_object(values)


def read_json(file: Path) -> Config:
    """Returns the checked `Config` in an existing `config.json`; raises as `from_json` does."""
    try:
        values = strict_json.read(file)
    except strict_json.JsonError as error:
        raise ConfigError(str(error)) from error
    return from_object(values, str(file))


def from_object(values: Any, where: str = "config.json") -> Config:
    """Returns the checked `Config` of a parsed JSON object; a missing field has its default.

    Raises:
      ConfigError: if there are unknown keys, wrong types or broken rules; the message has all.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must hold an object, not {type(values).__name__}.")
    classes = typing.get_type_hints(Config)
    known = [*classes, *field_types()]
    violations: list[str] = []
    groups: dict[str, Any] = {}
    for group, entries in values.items():
        if group not in classes:
            violations.append(f"{plain(group)}: unknown config group.{near_miss(group, known)}")
            continue
        if not isinstance(entries, Mapping):
            violations.append(f"{group}={shown(entries)} must be a group of fields.")
            continue
        hints, accepted = typing.get_type_hints(classes[group]), {}
        for name, value in entries.items():
            if name in hints:
                accepted[name] = _as_annotated(value, hints[name])
            else:
                dotted = f"{group}.{plain(name)}"
                violations.append(f"{dotted}: unknown config key.{field_hint(dotted, known)}")
        groups[group] = _unchecked(classes[group], accepted)
    config = _unchecked(Config, groups)
    _raise([*violations, *_violations(config)])
    return config


def _unchecked(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Returns a dataclass without running the checks of its constructor.

    The caller checks all groups together, so that one error has all messages.
    """
    made = object.__new__(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # _T is a dataclass.
        object.__setattr__(made, field.name, values.get(field.name, field.default))
    return made


def _violations(config: "Config") -> Iterator[str]:
    return rules.violations(config, dict(flat_fields(config)), field_types(include_extras=True))


def _as_annotated(value: Any, expected: Any) -> Any:
    """Converts an int to a float if the field is a float, because JSON may write 1 for 1.0."""
    whole = expected is float and type(value) is int
    # An int that no float represents exactly stays an int, and the type check refuses it.
    return float(value) if whole and abs(value) <= 1 << 53 else value


def changed(config: Config, change: Mapping[str, Any]) -> Config:
    """Returns a copy of `config` with the new values that `change` gives for dotted fields."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in change.items():
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    return dataclasses.replace(
        config,
        **{g: dataclasses.replace(getattr(config, g), **fields) for g, fields in groups.items()},
    )


def changed_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {dotted field: (old value, new value)} for all fields with different values."""
    old_flat, new_flat = dict(flat_fields(old)), dict(flat_fields(new))
    return {k: (old_flat[k], new_flat[k]) for k in old_flat if old_flat[k] != new_flat[k]}


def field_types(*, include_extras: bool = False) -> dict[str, Any]:
    """Returns {dotted field: type} for all fields; `include_extras` adds the limits to a type."""
    return {
        f"{group}.{name}": hint
        for group, cls in typing.get_type_hints(Config).items()
        for name, hint in typing.get_type_hints(cls, include_extras=include_extras).items()
    }


def flat_fields(config: Config) -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and the value of every field."""
    for group, node in vars(config).items():
        for name, value in vars(node).items():
            yield f"{group}.{name}", value
