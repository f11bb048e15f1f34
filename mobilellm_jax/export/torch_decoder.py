"""The decoder in PyTorch, for the formats that are converted from PyTorch programs.

Each stored block is one module; a model with shared blocks calls the module several times. The
caller passes the attention function, because each format has its own cache. The cache has one slot
(keys and values) per application of a block.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mobilellm_jax.config import Activation, ModelConfig
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.rope import frequencies

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Maps (slot, q_1TNH, k_1TKH, v_1TKH) to out_1TNH, and updates the cache."""


class TorchDecoder(nn.Module):
    """A MobileLLM with the shape in `config`, in float32, for one sequence at a time.

    A sequence has at most `positions` tokens, by default `config.max_seq_len`.
    """

    cos_SH: Tensor
    sin_SH: Tensor

    def __init__(
        self, config: ModelConfig, params: Mapping[str, Any], positions: int | None = None
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(_tensor(params["embedding"]["table"]))  # type: ignore[no-untyped-call]  # torch
        self.blocks = nn.ModuleList(
            _Block(config, params["blocks"], block) for block in range(config.num_blocks)
        )
        self.order = application_order(config.num_blocks, config.num_repeats, config.sharing)
        self.final_norm = _Norm(params["final_norm"]["scale"], config.norm_eps)
        # A tied head is a second parameter here, because each format has its own way to share it.
        if config.tie_embeddings:
            self.head = _linear(np.asarray(params["embedding"]["table"]).T)
        else:
            self.head = _linear(params["head"]["kernel"])
        frequencies_P = _tensor(frequencies(config))
        positions_S = torch.arange(positions or config.max_seq_len).float()
        angles_SH = positions_S[:, None] * frequencies_P[None]
        self.register_buffer("cos_SH", angles_SH.cos(), persistent=False)
        self.register_buffer("sin_SH", angles_SH.sin(), persistent=False)

    def forward(self, tokens_1T: Tensor, cos_TH: Tensor, sin_TH: Tensor, attend: Attend) -> Tensor:
        """Returns logits_1TV; `cos_TH` and `sin_TH` are `cos_SH` and `sin_SH` at the tokens."""
        turn = (cos_TH[None, :, None, :], sin_TH[None, :, None, :])
        x_1TD = self.embedding(tokens_1T)
        for slot, block in enumerate(self.order):
            x_1TD = self.blocks[block](x_1TD, turn, slot, attend)
        logits_1TV: Tensor = self.head(self.final_norm(x_1TD))
        return logits_1TV


class _Block(nn.Module):
    def __init__(self, config: ModelConfig, params: Mapping[str, Any], block: int) -> None:
        super().__init__()
        attention, feed_forward = params["attention"], params["feed_forward"]
        self.head_dim = config.head_dim
        self.activation: Activation = config.activation
        self.wide_matrices = config.wide_matrices
        self.attention_norm = _Norm(params["attention_norm"]["scale"][block], config.norm_eps)
        self.query, self.key, self.value = (
            _linear(np.asarray(attention[name][block]).reshape(config.embed_dim, -1))
            for name in ("query", "key", "value")
        )
        self.output = _linear(np.asarray(attention["output"][block]).reshape(-1, config.embed_dim))
        self.feed_forward_norm = _Norm(params["feed_forward_norm"]["scale"][block], config.norm_eps)
        for name in config.wide_matrices:
            self.add_module(name, _linear(feed_forward[name][block]))
        self.down = _linear(feed_forward["down"][block])

    def forward(
        self, x_1TD: Tensor, turn: tuple[Tensor, Tensor], slot: int, attend: Attend
    ) -> Tensor:
        h_1TD = self.attention_norm(x_1TD)
        q_1TNH, k_1TKH, v_1TKH = (
            project(h_1TD).unflatten(-1, (-1, self.head_dim))
            for project in (self.query, self.key, self.value)
        )
        out_1TNH = attend(slot, _rotate(q_1TNH, turn), _rotate(k_1TKH, turn), v_1TKH)
        x_1TD = x_1TD + self.output(out_1TNH.flatten(2))

        h_1TD = self.feed_forward_norm(x_1TD)
        wide = [getattr(self, name)(h_1TD) for name in self.wide_matrices]
        out_1TD: Tensor = self.down(activate(self.activation, wide))
        return x_1TD + out_1TD


def activate(activation: Activation, wide: Sequence[Tensor]) -> Tensor:
    """Applies the activation to the outputs of `ModelConfig.wide_matrices`."""
    match activation:
        case "swiglu":
            gate_1TF, up_1TF = wide
            return functional.silu(gate_1TF) * up_1TF
        case "relu":
            [up_1TF] = wide
            return functional.relu(up_1TF)
        case "gelu":
            [up_1TF] = wide
            return functional.gelu(up_1TF)
        case _:
            assert_never(activation)


class _Norm(nn.Module):
    def __init__(self, scale_D: Any, eps: float) -> None:
        super().__init__()
        self.scale_D = nn.Parameter(_tensor(scale_D), requires_grad=False)
        self.eps = eps

    def forward(self, x_1TD: Tensor) -> Tensor:
        mean_square = (x_1TD * x_1TD).mean(-1, keepdim=True)
        return x_1TD * torch.rsqrt(mean_square + self.eps) * self.scale_D


def _linear(kernel_IO: Any) -> nn.Linear:
    """Returns a layer that multiplies with `kernel_IO`; torch stores the transposed kernel."""
    weight_OI = _tensor(np.asarray(kernel_IO).T)
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    return linear


def _tensor(array: Any) -> Tensor:
    return torch.tensor(np.ascontiguousarray(array, dtype=np.float32))


def _rotate(x_1TNH: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Applies RoPE: rotates each pair of channels i and i + H / 2 of every head."""
    first, second = x_1TNH.chunk(2, dim=-1)
    cos, sin = turn
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
