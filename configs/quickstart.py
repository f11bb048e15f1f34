"""Trains a small MobileLLM on a laptop in minutes: layer sharing, GQA, tied embeddings.

Data:   `train` prepares the documentation that ships with Python (no download).
Run:    mobilellm train --config=configs/quickstart.py --workdir=runs/quickstart
Cost:   about three minutes on two CPU cores.
Result: the validation loss falls from 4.1 to at most 2.0 bits per byte.
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import to_config_dict


def get_config() -> ConfigDict:
    """Returns a config with two unique blocks, each applied twice, and with Muon.

    In a run of a million tokens, Muon reaches a lower loss than AdamW. The model has two wide
    heads, because on a CPU two heads of 64 are faster than four heads of 32. The paper's `init_std`
    of 0.02 fits widths of 576 and more. A model of width 128 learns faster with `init_std` = 0.06.
    """
    config = to_config_dict()
    config.model.update(
        vocab_size=4096,
        embed_dim=128,
        num_blocks=2,
        num_repeats=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        ffn_dim=384,
        max_seq_len=256,
        init_std=0.06,
        scan_unroll=2,
    )
    config.data.update(path="data/python_docs", source="python_docs", seq_len=256)
    config.optimizer.update(name="muon", peak_lr=2e-2, warmup_steps=20, min_lr_ratio=0.01)
    config.train.update(steps=560, global_batch=8, eval_every=280, checkpoint_every=280)
    return config
