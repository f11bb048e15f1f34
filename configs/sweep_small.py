"""Trains the paper's ablation grids at about 20M parameters; `sweep` sets the shapes.

Data:   mobilellm prepare --source="text:corpus/*.txt" --vocab_size=8192 --output=data/sweep_8192
Run:    mobilellm sweep --grid=all --scale=small --seeds=3 --workdir=runs/small
        (the default is --config=configs/sweep_small.py)
Cost:   24 models x 3 seeds x 131M tokens, about 1,600 PFLOP.
Result: we have not run this sweep yet.
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import to_config_dict


def get_config() -> ConfigDict:
    """Returns the recipe: AdamW as in the paper, and 2000 steps of 65,536 tokens."""
    config = to_config_dict()
    config.model.update(vocab_size=8192, max_seq_len=1024, init_std=0.03)
    config.data.update(path="data/sweep_8192", seq_len=1024)
    config.optimizer.update(peak_lr=3e-3, warmup_steps=100)
    config.train.update(steps=2000, global_batch=64, eval_every=200, eval_batches=32)
    config.train.update(checkpoint_every=1000, keep_checkpoints=1)
    return config
