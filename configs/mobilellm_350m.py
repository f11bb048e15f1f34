"""MobileLLM-350M (Liu et al. 2024, arXiv:2402.14905).

The model of Table 9 has 32 blocks of width 960 and 345,355,200 parameters.

Data:   mobilellm prepare --source="text:corpus/*.txt" --vocab_size=32000 --output=data/pretrain
        (the authors have not published their mixture)
Run:    mobilellm train --config=configs/mobilellm_350m.py --workdir=runs/mobilellm_350m
        (add --config.train.accumulation_steps=N if 1024 sequences do not fit in memory)
Cost:   1T tokens. The authors needed about 6 days on 32 A100-80G.
Result: the authors report a mean zero-shot accuracy of 51.3 on eight tasks (Table 10).
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import Config, DataConfig, to_config_dict
from mobilellm_jax.paper.architectures import MOBILELLM


def get_config() -> ConfigDict:
    """Returns the paper's recipe, the default: 480k steps of 1024 sequences of 2048 tokens."""
    return to_config_dict(Config(model=MOBILELLM["350m"], data=DataConfig(path="data/pretrain")))
