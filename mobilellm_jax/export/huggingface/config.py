"""Writes and reads the config.json of a Hugging Face directory."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mobilellm_jax.config import Activation, ConfigError, ModelConfig, RopeScaling
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import strict_json
from mobilellm_jax.storage.strict_json import plain, shown

Layout = Literal["hf", "mobilellm"]

MODELING_FILE = "modeling_mobilellm.py"
# In the class of a config, transformers 5 reserves rope_scaling for its own use.
_OWN_SCALING = "rotary_scaling"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mobilellm": "MobileLLMForCausalLM",
}
# transformers gives these values to keys that are missing. For the other model types, null and a
# missing key are the same.
_MISTRAL_DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
# Maps each activation to (hidden_act, whether the feed-forward has a gate).
_ACTIVATIONS: Mapping[Activation, tuple[str, bool]] = {
    "swiglu": ("silu", True),
    "relu": ("relu", False),
    "gelu": ("gelu", False),
}
_ACT_ALIASES = {"swish": "silu"}
# Maps each type of RoPE scaling to its type in config.json, and to the key of each field.
_ROPE: Mapping[RopeScaling, tuple[str, Mapping[str, str]]] = {
    "none": ("default", {}),
    "linear": ("linear", {"rope_factor": "factor"}),
    "llama3": (
        "llama3",
        {
            "rope_factor": "factor",
            "rope_low_freq_factor": "low_freq_factor",
            "rope_high_freq_factor": "high_freq_factor",
            "rope_original_len": "original_max_position_embeddings",
        },
    ),
}
_LIST_LIMIT = 8
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    "num_attention_heads",
)
_INTEGERS = (
    *(*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("layer_sharing_repeats", "sliding_window", "original_max_position_embeddings"),
)
_FLOATS = (
    *("rms_norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor"),
    *("factor", "low_freq_factor", "high_freq_factor"),
)
_BOOLS = (
    *("tie_word_embeddings", "share_embedding", "gated_mlp", "layer_sharing"),
    *("attention_bias", "mlp_bias", "use_sliding_window"),
)
_ROPE_SETTINGS = ("rope_scaling", "rope_parameters", _OWN_SCALING)
_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(_INTEGERS, int),
    **dict.fromkeys(_FLOATS, float),
    **dict.fromkeys(_BOOLS, bool),
    **dict.fromkeys(("model_type", "hidden_act", "layer_sharing_order", "rope_type", "type"), str),
    **dict.fromkeys(("architectures", "layer_types"), list[str]),
    **dict.fromkeys((*_ROPE_SETTINGS, "quantization_config"), dict[str, Any]),
}
"""Maps each key that is read, also inside the RoPE settings, to its type. Other keys may occur."""


def check_llama(config: ModelConfig) -> None:
    """Raises a `UserError` if LlamaForCausalLM cannot express the model."""
    problems = []
    if config.activation != "swiglu":
        problems.append(
            f"model.activation={config.activation} has two matrices in the feed-forward, and "
            "LlamaForCausalLM always three (swiglu)"
        )
    if config.embed_dim % config.num_heads:
        problems.append(
            f"model.embed_dim={config.embed_dim} is not a multiple of "
            f"model.num_heads={config.num_heads}, which LlamaConfig refuses"
        )
    if problems:
        raise UserError(f"{'; '.join(problems)}. Use --format=mobilellm, which can express it.")


def to_config_json(config: ModelConfig, num_layers: int, layout: Layout) -> dict[str, Any]:
    """Returns a config.json's keys for a model with `num_layers` stored layers."""
    hidden_act, gated = _ACTIVATIONS[config.activation]
    model_type = "llama" if layout == "hf" else "mobilellm"
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": hidden_act,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.init_std,
        "use_cache": True,
    }
    rope_type, keys = _ROPE[config.rope_scaling]
    scaling = {"rope_type": rope_type, **{key: getattr(config, f) for f, key in keys.items()}}
    if layout == "hf":
        if config.rope_scaling != "none":
            values["rope_scaling"] = scaling
        # transformers 4 reads rope_theta and rope_scaling, transformers 5 reads rope_parameters.
        return values | {"rope_parameters": scaling | {"rope_theta": config.rope_theta}}
    module = MODELING_FILE.removesuffix(".py")
    auto_map = {
        "AutoConfig": f"{module}.MobileLLMConfig",
        "AutoModelForCausalLM": f"{module}.MobileLLMForCausalLM",
    }
    return values | {
        "auto_map": auto_map,
        "gated_mlp": gated,
        "share_embedding": config.tie_embeddings,
        _OWN_SCALING: None if config.rope_scaling == "none" else scaling,
        "layer_sharing": config.num_repeats > 1,
        "layer_sharing_repeats": config.num_repeats,
        "layer_sharing_order": config.sharing,
    }


def from_config_json(values: Mapping[str, Any], file: Path) -> ModelConfig:
    """Returns the architecture that `values` describes; `values` is the content of `file`.

    Raises:
      UserError: if this package would compute anything differently; the message lists all of it.
    """
    if "model_type" not in values:
        raise UserError(
            f"{file} has no model_type, so it does not describe a Hugging Face model; a run folder "
            "needs no import."
        )
    values = _without_nulls(values)
    _check_values(values, file)
    try:
        return _model(values, file)
    except ConfigError as error:
        raise UserError(
            f"{file} describes a model that this package does not have:\n{error}"
        ) from error


def ignores_head(values: Mapping[str, Any]) -> bool:
    """Returns whether the paper's code has no output head for this config.json.

    That code then ignores a head in the weight files. transformers would use the head of a Llama.
    """
    return values.get("model_type") == "mobilellm" and values.get("share_embedding") is True


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values as transformers understands them, without null."""
    defaults = _MISTRAL_DEFAULTS if values.get("model_type") == "mistral" else {}
    return {key: value for key, value in {**defaults, **values}.items() if value is not None}


def _model(values: Mapping[str, Any], file: Path) -> ModelConfig:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads")
    shared = bool(values.get("layer_sharing", False))
    # Missing keys have the default values of LlamaConfig.
    return ModelConfig(
        vocab_size=values["vocab_size"],
        embed_dim=width,
        num_blocks=values["num_hidden_layers"],
        # The paper's code always applies each block twice in a row, so it has no keys for this.
        num_repeats=values.get("layer_sharing_repeats", 2) if shared else 1,
        sharing=values.get("layer_sharing_order", "immediate"),
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=_head_dim(values, file),
        ffn_dim=values["intermediate_size"],
        activation=next(a for a, act in _ACTIVATIONS.items() if act == _activation(values)),
        # The paper's tied models have tie_word_embeddings: false and share_embedding: true.
        tie_embeddings=bool(values.get("tie_word_embeddings", False))
        or bool(values.get("share_embedding", False)),
        max_seq_len=_max_positions(values),
        **_rope_fields(values),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        init_std=float(values.get("initializer_range", 0.02)),
    )


def _check_values(values: Mapping[str, Any], file: Path) -> None:
    problems = []
    # The test needs a list, because the value may be unhashable.
    if values.get("model_type") not in [*_ARCHITECTURES]:
        model_type = shown(values.get("model_type"))
        problems.append(f"model_type={model_type} must be {_one_of(_ARCHITECTURES)}.")
    # The values are checked only if all of them have the right type.
    problems += list(_ill_typed(values)) or list(_unsupported(values))
    if problems:
        raise UserError(
            "\n".join([f"{file} describes a model that this package does not have:", *problems])
        )


def _head_dim(values: Mapping[str, Any], file: Path) -> int:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim: int | None = values.get("head_dim")
    if head_dim is not None:
        return head_dim
    if width % heads:
        raise UserError(
            f"{file}: hidden_size={width} must be a multiple of num_attention_heads={heads}, "
            "because there is no head_dim; add head_dim."
        )
    return int(width // heads)


def _ill_typed(values: Mapping[str, Any]) -> Iterator[str]:
    for name in ("", *_ROPE_SETTINGS):
        holder = values.get(name) if name else values
        for key, expected in _TYPES.items() if isinstance(holder, Mapping) else ():
            try:
                strict_json.get(holder, key, expected, None, name)
            except strict_json.JsonError as error:
                yield str(error)
    for key in _REQUIRED:
        value = values.get(key)
        if value is None or (type(value) is int and value < 1):
            yield f"{key}={value!r} must be a whole number above 0."


def _activation(values: Mapping[str, Any]) -> tuple[Any, bool]:
    act = values.get("hidden_act", "silu")
    return _ACT_ALIASES.get(act, act), bool(values.get("gated_mlp", True))


def _max_positions(values: Mapping[str, Any]) -> int:
    return int(values.get("max_position_embeddings", 2048))


def _rope(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the RoPE settings of transformers 4 or 5 or our own; {} means no scaling."""
    found: Mapping[str, Any] = next((values[key] for key in _ROPE_SETTINGS if values.get(key)), {})
    return {key: value for key, value in found.items() if value is not None}


def _rope_type(values: Mapping[str, Any]) -> str:
    rope = _rope(values)
    return str(rope.get("rope_type", rope.get("type", "default")))


def _rope_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a `ModelConfig` that describe RoPE."""
    rope = _rope(values)
    theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    [scaling] = [name for name, (kind, _) in _ROPE.items() if kind == _rope_type(values)]
    original = values.get("original_max_position_embeddings", _max_positions(values))
    given = {"original_max_position_embeddings": original, **rope}
    fields = {field: given[key] for field, key in _ROPE[scaling][1].items()}
    floats = {f: v if f == "rope_original_len" else float(v) for f, v in fields.items()}
    return {"rope_theta": float(theta), "rope_scaling": scaling, **floats}


def _one_of(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _unsupported(values: Mapping[str, Any]) -> Iterator[str]:
    model_type = values.get("model_type")
    architectures = values.get("architectures", [])
    if not set(architectures) <= set(_ARCHITECTURES.values()):
        known = _one_of(_ARCHITECTURES.values())
        yield f"architectures={shown(architectures)} must be {known}."
    rope = _rope(values)
    yield from _unsupported_scaling(rope, _rope_type(values))
    for holder in (values, rope):
        factor = holder.get("partial_rotary_factor", 1.0)
        if factor != 1.0:
            yield f"partial_rotary_factor={factor} must be 1."
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            yield f"{key}=true is not supported; no projection here has a bias."
    if _activation(values) not in _ACTIVATIONS.values() or (
        model_type != "mobilellm" and _activation(values)[0] != "silu"
    ):
        gated = model_type != "mobilellm"
        allowed = "silu" if gated else "silu gated, or relu or gelu not gated"
        yield f"hidden_act={shown(values.get('hidden_act'))} must be {allowed}."
    window, longest = values.get("sliding_window"), _max_positions(values)
    windows = window is not None and values.get("use_sliding_window", True) and window < longest
    if windows:
        yield (
            f"sliding_window={window} is less than max_position_embeddings={longest}, and "
            "attention here reaches all earlier tokens. Lower max_position_embeddings to "
            f"{window} in config.json to use the model within its window."
        )
    # A window that no text outgrows is full attention.
    covered = set() if windows or window is None else {"sliding_attention"}
    odd = sorted(set(values.get("layer_types", [])) - {"full_attention"} - covered)
    if odd:
        named = ", ".join(map(plain, odd[:_LIST_LIMIT]))
        yield f"layer_types {named} are not supported, only full_attention."
    # transformers leaves "gguf" behind when it turns a GGUF file into a directory of floats.
    quantized = values.get("quantization_config") or {}
    if quantized and quantized.get("quant_method") != "gguf":
        yield "quantization_config is not supported; give the unquantised weights."


def _unsupported_scaling(rope: Mapping[str, Any], rope_type: str) -> Iterator[str]:
    known = dict(_ROPE.values())
    if rope_type not in known:
        yield f"RoPE scaling {shown(rope_type)} is not supported, only {_one_of(known)}."
        return
    # transformers takes the original length from other keys if it is missing.
    needed = [k for k in known[rope_type].values() if k != "original_max_position_embeddings"]
    if missing := [key for key in needed if key not in rope]:
        yield f"RoPE scaling {shown(rope_type)} needs {', '.join(missing)}."
