"""MobileLLM-350M (Liu et al. 2024, arXiv:2402.14905).

Table 9: 32 blocks of width 960, 345,355,200 parameters.

Data:   mobilellm prepare --source="text:corpus/*.txt" --vocab_size=32000 --output=data/pretrain
        (the authors' mixture is not published)
Run:    mobilellm train --config=configs/mobilellm_350m.py --workdir=runs/mobilellm_350m
        (--config.train.accumulation_steps=N where 1024 sequences do not fit at once)
Cost:   1T tokens; the authors took about 6 days on 32 A100-80G.
Result: mean zero-shot accuracy on the eight tasks 51.3 (Table 10).
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import Config, DataConfig, to_config_dict
from mobilellm_jax.paper.architectures import MOBILELLM


def get_config() -> ConfigDict:
    """The paper's recipe is the default: 480k steps of 1024 sequences of 2048 tokens."""
    return to_config_dict(Config(model=MOBILELLM["350m"], data=DataConfig(path="data/pretrain")))
