"""Trains the quickstart's model a tenth longer, for 8-bit weights and 8-bit activations.

Data:   the data of configs/quickstart.py. The run starts from the model in runs/quickstart.
Run:    mobilellm train --config=configs/quantize/quickstart_w8a8.py --workdir=runs/quickstart_w8a8
        mobilellm evaluate --checkpoint=runs/quickstart_w8a8 --quantize=w8a8 --perplexity=README.md
Cost:   half a minute on two CPU cores.
Result: the quantized validation loss rises from 4.1714 to 4.1740. The float32 loss is 4.1707, so
        8 bits cost only 0.0007 nats and training has little to recover. At this learning rate, the
        loss of the float32 model also rises, to 4.1730.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the quickstart's config with a tenth of the steps and 1/25 of the peak learning rate.

    The rate falls to a hundredth of its peak.
    """
    base = runpy.run_path(str(Path(__file__).parents[1] / "quickstart.py"))
    config: ConfigDict = base["get_config"]()
    config.quantize.scheme = "w8a8"
    config.optimizer.update(peak_lr=8e-4, warmup_steps=5)
    config.train.update(
        init_from="runs/quickstart", steps=56, eval_every=14, checkpoint_every=28, seed=1
    )
    config.data.seed = 1  # another order of windows than in the quickstart
    return config
