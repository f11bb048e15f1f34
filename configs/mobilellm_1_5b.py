"""MobileLLM-1.5B (Liu et al. 2024, arXiv:2402.14905).

The model of Table 9 has 54 blocks of width 1600 and 1,511,188,800 parameters.

Data:   mobilellm prepare --source="text:corpus/*.txt" --vocab_size=32000 --output=data/pretrain
        (the authors have not published their mixture)
Run:    mobilellm train --config=configs/mobilellm_1_5b.py --workdir=runs/mobilellm_1_5b
        (add --config.train.accumulation_steps=N if 1024 sequences do not fit in memory)
Cost:   1T tokens. The authors needed about 18 days on 32 A100-80G.
Result: the authors report a mean zero-shot accuracy of 59.4 on eight tasks (Table 8).
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import Config, DataConfig, to_config_dict
from mobilellm_jax.paper.architectures import MOBILELLM


def get_config() -> ConfigDict:
    """Returns the paper's recipe, the default: 480k steps of 1024 sequences of 2048 tokens."""
    return to_config_dict(Config(model=MOBILELLM["1_5b"], data=DataConfig(path="data/pretrain")))
