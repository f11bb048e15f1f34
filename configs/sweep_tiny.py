"""Trains the paper's ablation grids at about 1.4M parameters; `sweep` sets the shapes.

Data:   `sweep` prepares the documentation that ships with Python (no download). --config.data.path
        can name another folder of `prepare` with a vocabulary of 2048.
Run:    mobilellm sweep --grid=all --seeds=3 --parallel=2 --workdir=runs/tiny
        (the default is --config=configs/sweep_tiny.py)
Cost:   20 models x 3 seeds; the trial estimates 2.4 hours on two CPU cores.
Result: docs/experiments.md has the results of depth_width, and of all grids with half of the steps
        (--config.train.steps=200).
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import to_config_dict


def get_config() -> ConfigDict:
    """Returns the recipe: AdamW as in the paper, and 400 steps of 2,048 tokens.

    `init_std` and the learning rate are chosen for widths of about 100.
    """
    config = to_config_dict()
    config.model.update(vocab_size=2048, max_seq_len=256, init_std=0.06)
    config.data.update(path="data/python_docs_2048", source="python_docs", seq_len=256)
    config.optimizer.update(peak_lr=5e-3, warmup_steps=40, min_lr_ratio=0.1)
    config.train.update(steps=400, global_batch=8, log_every=10, loss_chunk=2048)
    config.train.update(eval_every=40, eval_batches=16, checkpoint_every=200, keep_checkpoints=1)
    return config
