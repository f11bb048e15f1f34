"""A MobileLLM in miniature that a laptop trains in minutes: layer sharing, GQA, tied embeddings.

Data:   made by `train` itself from the documentation that ships with Python (no download).
Run:    mobilellm train --config=configs/quickstart.py --workdir=runs/quickstart
Cost:   a few minutes on two CPU cores.
Result: at most 2.0 bits per byte on the validation split.
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import to_config_dict


def get_config() -> ConfigDict:
    """Four unique blocks, each applied twice, with the paper's optimizer at a higher peak."""
    config = to_config_dict()
    config.model.update(
        vocab_size=4096,
        embed_dim=128,
        num_blocks=4,
        num_repeats=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        ffn_dim=384,
        max_seq_len=256,
    )
    config.data.update(path="data/python_docs", source="python_docs", seq_len=256)
    config.optimizer.update(peak_lr=4e-3, warmup_steps=40)
    config.train.update(steps=400, global_batch=16, eval_every=100, checkpoint_every=100)
    return config
