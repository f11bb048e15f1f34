"""MobileLLM-1B (Liu et al. 2024, arXiv:2402.14905).

Table 9: 54 blocks of width 1280, 1,005,461,760 parameters.

Data:   mobilellm prepare --source="text:corpus/*.txt" --vocab_size=32000 --output=data/pretrain
        (the authors' mixture is not published)
Run:    mobilellm train --config=configs/mobilellm_1b.py --workdir=runs/mobilellm_1b
        (--config.train.accumulation_steps=N where 1024 sequences do not fit at once)
Cost:   1T tokens; the authors took about 12 days on 32 A100-80G.
Result: mean zero-shot accuracy on the eight tasks 57.3 (Table 8).
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import Config, DataConfig, to_config_dict
from mobilellm_jax.paper.architectures import MOBILELLM


def get_config() -> ConfigDict:
    """The paper's recipe is the default: 480k steps of 1024 sequences of 2048 tokens."""
    return to_config_dict(Config(model=MOBILELLM["1b"], data=DataConfig(path="data/pretrain")))
