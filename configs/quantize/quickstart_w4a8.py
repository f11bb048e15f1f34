"""Trains the quickstart's model a tenth longer, for 4-bit weights and 8-bit activations.

Data:   the data of configs/quickstart.py. The run starts from the model in runs/quickstart.
Run:    mobilellm train --config=configs/quantize/quickstart_w4a8.py --workdir=runs/quickstart_w4a8
        mobilellm evaluate --checkpoint=runs/quickstart_w4a8 --quantize=w4a8 --perplexity=README.md
Cost:   half a minute on two CPU cores.
Result: the quantized validation loss falls from 4.1874 to 4.1776. The float32 loss is 4.1707, so
        the training recovers 58% of the loss from quantization (55% with other seeds). In groups of
        128 (--config.quantize.scheme=w4a8g128), the loss falls from 4.1955 to 4.1789, which is 67%.
        benchmarks/2026-11_design_measurements.md has the results of other learning rates.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the quickstart's config with a tenth of the steps and 1/50 of the peak learning rate.

    The rate is constant after the warmup and falls over the last fifth of the steps.
    """
    base = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))
    config: ConfigDict = base["get_config"]()
    config.quantize.scheme = "w4a8"
    config.optimizer.update(schedule="wsd", peak_lr=4e-4, warmup_steps=5)
    config.train.update(
        init_from="runs/quickstart", steps=56, eval_every=14, checkpoint_every=28, seed=1
    )
    config.data.seed = 1  # another order of windows than in the quickstart
    return config
