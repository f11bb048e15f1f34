"""The quickstart's model, trained a tenth longer for 4-bit weights and 8-bit activations.

Data:   that of configs/quickstart.py, which is where the run starts from
Run:    mobilellm train --config=configs/quantize/quickstart_w4a8.py --workdir=runs/quickstart_w4a8
        mobilellm evaluate --checkpoint=runs/quickstart_w4a8 --quantize=w4a8 --perplexity=README.md
Cost:   half a minute on two CPU cores.
Result: validation loss in those levels 4.1874 before and 4.1776 after, where float32 is 4.1707: 58%
        of what quantizing costs comes back (55% with other seeds). In groups of 128
        (--config.quantize.scheme=w4a8g128) 4.1955 and 4.1789: 67%. Other rates: docs/decisions.md.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A tenth of the steps at a fiftieth of the peak learning rate, which falls at the end only."""
    base = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))
    config: ConfigDict = base["get_config"]()
    config.quantize.scheme = "w4a8"
    config.optimizer.update(schedule="wsd", peak_lr=4e-4, warmup_steps=5)
    config.train.update(
        init_from="runs/quickstart", steps=56, eval_every=14, checkpoint_every=28, seed=1
    )
    config.data.seed = 1  # other windows first than those that the run before saw first
    return config
