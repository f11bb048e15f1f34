"""MobileLLM (Liu et al. 2024, arXiv:2402.14905) for transformers, with shared blocks stored once.

An exported folder contains a copy of this file, and `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` runs the copy. The file needs only torch and transformers (4.46 or newer).

Each application of a shared block has other inputs, and therefore its own slot in the key-value
cache. If embeddings are shared, the embedding table is also the matrix of the output head.
"""
# mypy: ignore-errors

import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# The cache is called `past_key_values` in transformers up to 5.23, and `cache` from 5.24 on.
_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"

_ACTIVATIONS = {"silu": functional.silu, "relu": functional.relu, "gelu": functional.gelu}


_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "gated_mlp": True,
    "share_embedding": True,
    "layer_sharing": False,
    "layer_sharing_repeats": 2,
    "layer_sharing_order": "immediate",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rotary_scaling": None,
    "initializer_range": 0.02,
    "use_cache": True,
}


class MobileLLMConfig(PretrainedConfig):
    """The shape of the model; `num_hidden_layers` counts stored blocks, without repeats."""

    model_type = "mobilellm"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012  # a list to transformers

    def __init__(self, **values):
        for name, default in _DEFAULTS.items():
            setattr(self, name, values.pop(name, default))
        values = {"bos_token_id": 1, "eos_token_id": 2} | values
        super().__init__(**values | {"tie_word_embeddings": self.share_embedding})

    @property
    def application_order(self):
        """The indices of the stored blocks, in the order in which the model applies them."""
        blocks = list(range(self.num_hidden_layers))
        if not self.layer_sharing:
            return blocks
        repeats = self.layer_sharing_repeats
        if self.layer_sharing_order == "immediate":
            return [block for block in blocks for _ in range(repeats)]
        odd_passes = {"repeat_all": blocks, "reverse": blocks[::-1]}[self.layer_sharing_order]
        return [b for r in range(repeats) for b in (odd_passes if r % 2 else blocks)]


class MobileLLMAttention(nn.Module):
    """Grouped-query attention with rotary position embeddings (RoPE)."""

    def __init__(self, config):
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(width, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, width, bias=False)

    def forward(self, x, rotation, mask, cache, slot):
        batch, length, _ = x.shape
        # (batch, heads, tokens, head_dim)
        q, k, v = (
            projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.update(k, v, slot)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MobileLLMMLP(nn.Module):
    """The feed-forward: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config):
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.act = _ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(width, hidden, bias=False) if config.gated_mlp else None
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MobileLLMBlock(nn.Module):
    """Attention and feed-forward, each with a norm before it and a residual connection."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MobileLLMAttention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MobileLLMMLP(config)

    def forward(self, x, rotation, mask, cache, slot):
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache, slot)
        return x + self.mlp(self.post_attention_layernorm(x))


class MobileLLMPreTrainedModel(PreTrainedModel):
    """The base class of the models below, with settings that transformers reads."""

    config_class = MobileLLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["MobileLLMBlock"]  # noqa: RUF012  # a list to transformers
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = False


class MobileLLMModel(MobileLLMPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MobileLLMBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        cache=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is not None:
            add_slots(cache, len(self.config.application_order))
        seen = cache.get_seq_length() if cache is not None else 0
        if attention_mask is not None and attention_mask.shape[-1] != seen + x.shape[1]:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[-1]} tokens, but there are {seen} in "
                f"the cache and {x.shape[1]} new ones; this transformers may pass its cache under "
                "a name that is not known here."
            )
        standing = torch.arange(seen, seen + x.shape[1], device=x.device)
        if position_ids is None:
            position_ids = standing[None]
        rotation = rotation_at(position_ids, self.config)
        mask = causal_mask(standing, attention_mask)
        states = []
        for slot, block in enumerate(self.config.application_order):
            states.append(x)
            x = self.layers[block](x, rotation, mask, cache, slot)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            **{CACHE: cache if use_cache else None},
            hidden_states=(*states, x) if output_hidden_states else None,
        )


class MobileLLMForCausalLM(MobileLLMPreTrainedModel, GenerationMixin):
    """The decoder with its output head, which is the embedding table if `share_embedding`."""

    def __init__(self, config):
        super().__init__(config)
        self.model = MobileLLMModel(config)
        if not config.share_embedding:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.model.embed_tokens if self.config.share_embedding else self.lm_head

    def set_output_embeddings(self, value):
        if self.config.share_embedding:
            self.model.embed_tokens = value
        else:
            self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        x = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = functional.linear(x[:, kept], self.get_output_embeddings().weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
        )
        return output if return_dict is not False else output.to_tuple()


def add_slots(cache, count):
    """Extends a cache with a slot per stored block to one slot per application of a block."""
    if not isinstance(cache, DynamicCache):
        raise ValueError("Only a dynamic cache is supported; leave cache_implementation unset.")
    layers = getattr(cache, "layers", None)
    if layers:  # A cache without slots was made without a config, and grows when used.
        layers.extend(type(layers[0])() for _ in range(count - len(layers)))


def frequencies(config, device):
    """Returns theta^(-2i / head_dim) of every pair i, scaled as `rotary_scaling` says."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rotary_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "default":
        return plain
    slowed = plain / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"RoPE scaling {scaling['rope_type']!r} is not supported.")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / plain)
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * slowed + share * plain


def rotation_at(position_ids, config):
    """Returns cosine and sine of position * frequency, repeated for both halves of a head."""
    angles = position_ids[:, None, :, None].float() * frequencies(config, position_ids.device)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, rotation):
    """Rotates each pair of channels i and i + head_dim / 2 of every head, in float32."""
    cos, sin = rotation
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def causal_mask(standing, attention_mask):
    """Returns a mask: a token attends to itself and to the earlier tokens that are not padding.

    A padding token also attends to itself, because a softmax over no scores would give NaN.
    """
    keys = torch.arange(int(standing[-1]) + 1, device=standing.device)
    mask = (keys[None, :] <= standing[:, None])[None, None]
    if attention_mask is not None:
        own = keys[None, :] == standing[:, None]
        mask = (mask & attention_mask[:, None, None, : len(keys)].bool()) | own
    return mask
