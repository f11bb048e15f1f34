import numpy as np
import pytest
import torch

from mobilellm_jax.export.torch_decoder import TorchDecoder

# The tolerance covers float32 sums in another order, over up to 96 terms, through few layers.
TOLERANCE = 2e-5

MODELS = {
    "plain": {},
    "immediate": {"num_repeats": 2},
    "repeat_all": {"num_repeats": 2, "sharing": "repeat_all"},
    "reverse": {"num_repeats": 3, "sharing": "reverse"},
    "untied": {"tie_embeddings": False},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu"},
    "rope llama3": {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_len": 64},
    "one key head, wide": {"num_kv_heads": 1, "head_dim": 24},
}


class Cache:
    """Computes attention over lists of keys and values with torch's own function."""

    def __init__(self, slots: int):
        self.k = [torch.zeros(1, 0, 1, 1)] * slots
        self.v = [torch.zeros(1, 0, 1, 1)] * slots
        self.length = 0

    def attend(self, slot, q, k, v):
        k = self.k[slot] = torch.cat([self.k[slot], k], 1) if self.length else k
        v = self.v[slot] = torch.cat([self.v[slot], v], 1) if self.length else v
        rows = torch.arange(self.length, self.length + q.shape[1])
        mask = torch.arange(k.shape[1])[None, :] <= rows[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )
        return out.transpose(1, 2)


def extend(decoder: TorchDecoder, tokens_T: np.ndarray, cache: Cache) -> np.ndarray:
    at = slice(cache.length, cache.length + len(tokens_T))
    with torch.inference_mode():
        logits = decoder(
            torch.tensor(tokens_T)[None], decoder.cos_SH[at], decoder.sin_SH[at], cache.attend
        )
    cache.length += len(tokens_T)
    return logits[0].numpy()


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_it_is_the_model_at_once_and_step_by_step(make_model, fields) -> None:
    config, params, tokens_BT, logits_BTV = make_model(scale=5.0, **fields)
    decoder = TorchDecoder(config, params).eval()
    tokens_T, logits_TV = tokens_BT[0, :40], logits_BTV[0, :40]
    scale = max(1.0, np.abs(logits_TV).max())
    at_once_TV = extend(decoder, tokens_T, Cache(config.applied_depth))
    assert np.abs(at_once_TV - logits_TV).max() <= TOLERANCE * scale
    cache = Cache(config.applied_depth)
    steps_TV = np.concatenate([extend(decoder, tokens_T[t : t + 1], cache) for t in range(40)])
    assert np.abs(steps_TV - logits_TV).max() <= TOLERANCE * scale


def test_shared_weights_are_there_once(make_model) -> None:
    config, params, _, _ = make_model(num_repeats=3)
    decoder = TorchDecoder(config, params)
    assert len(decoder.blocks) == 2 and len(decoder.order) == 6
