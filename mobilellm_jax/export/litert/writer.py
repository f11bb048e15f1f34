"""Writes `model.tflite` for LiteRT.

Every signature (`litert/signatures.py`) takes `tokens[1, T]`, `start[1]` (the position of the first
token), and the cache. It returns `logits[1, T, V]` and the cache with the rows of the new tokens.
The operator DYNAMIC_UPDATE_SLICE writes these rows; it does not copy the cache if the caller uses
one buffer for argument and result. The caller pads a chunk of fewer than `CHUNK` tokens. Later
tokens overwrite the cache rows of the padding before any token reads these rows. All signatures
share the weights, so an additional signature adds only 10 kB per layer to the file.
"""

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import torch
from ai_edge_quantizer import quantizer, recipe
from litert_torch import Converter
from litert_torch._config import config as converter_config
from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice
from torch import Tensor, nn

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.export.litert.signatures import cache_shapes, capacity, signatures
from mobilellm_jax.export.torch_decoder import TorchDecoder
from mobilellm_jax.model.opened import OpenedModel


def write(source: OpenedModel, folder: Path, precision: str) -> int:
    """Writes `model.tflite`; returns how many blocks it contains."""
    config = source.config
    decoder = TorchDecoder(config, source.params, capacity(config))
    converter_config.show_progress = False
    converter = Converter()
    for name, (length, span) in signatures(config).items():
        sample = _sample(config, length)
        step = _Step(config, decoder, span).eval()
        converter.add_signature(name, step, sample_kwargs=sample)
    # The converter's jax code needs rank promotion. torch warns about its own future changes.
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings(action="ignore"):
        model = converter.convert()
    file = folder / "model.tflite"
    if precision == "float32":
        model.export(str(file))
        return config.num_blocks
    recipes = {"int8": recipe.dynamic_wi8_afp32}
    maker: Any = quantizer.Quantizer(model.model_content(), recipes[precision]())
    with contextlib.redirect_stdout(sys.stderr):  # The quantizer prints sizes.
        quantized = maker.quantize()
    file.write_bytes(quantized.quantized_model)
    return config.num_blocks


class _Step(nn.Module):
    """The decoder of a signature; attention reads the first `span` rows of the cache."""

    def __init__(self, config: ModelConfig, decoder: TorchDecoder, span: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.span = span
        self.kv_heads = config.num_kv_heads
        self.group = config.num_heads // config.num_kv_heads

    def forward(self, tokens: Tensor, start: Tensor, cache: dict[str, Tensor]) -> dict[str, Tensor]:
        length = tokens.shape[1]
        positions_T = start + torch.arange(length, dtype=torch.int32)
        keys_S = torch.arange(self.span, dtype=torch.int32)
        # softmax gives a score of -1e30 the weight 0. Minus infinity could give NaN.
        mask_TS = torch.where(keys_S[None, :] <= positions_T[:, None], 0.0, -1e30)
        mask_11MS = mask_TS[None, None].repeat(1, 1, self.group, 1)  # M = G * T
        zero, at = torch.zeros((), dtype=torch.int32), start.reshape(())
        longer = dict(cache)

        def written(name: str, new_1TKH: Tensor) -> Tensor:
            new_1KTH = new_1TKH.transpose(1, 2)
            longer[name] = dynamic_update_slice(cache[name], new_1KTH, [zero, zero, at, zero])
            return longer[name][:, :, : self.span]

        def attend(slot: int, q_1TNH: Tensor, k_1TKH: Tensor, v_1TKH: Tensor) -> Tensor:
            k_1KSH = written(f"keys_{slot}", k_1TKH)
            v_1KSH = written(f"values_{slot}", v_1TKH)
            head_dim = q_1TNH.shape[-1]
            q_1KMH = q_1TNH.transpose(1, 2).reshape(1, self.kv_heads, -1, head_dim)
            scores_1KMS = (q_1KMH * head_dim**-0.5) @ k_1KSH.transpose(2, 3) + mask_11MS
            out_1KMH = torch.softmax(scores_1KMS, dim=-1) @ v_1KSH
            return out_1KMH.reshape(1, -1, length, head_dim).transpose(1, 2)

        cos_TH, sin_TH = self.decoder.cos_SH[positions_T], self.decoder.sin_SH[positions_T]
        return {"logits": self.decoder(tokens, cos_TH, sin_TH, attend), **longer}


def _sample(config: ModelConfig, length: int) -> dict[str, Any]:
    """Returns example arguments, each its own tensor: the converter merges shared tensors."""
    return {
        "tokens": torch.zeros(1, length, dtype=torch.int32),
        "start": torch.zeros(1, dtype=torch.int32),
        "cache": {name: torch.zeros(shape) for name, shape in cache_shapes(config).items()},
    }
