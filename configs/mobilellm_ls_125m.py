"""MobileLLM-LS-125M (Liu et al. 2024, arXiv:2402.14905).

The model of Tables 9 and 10 applies each of the 30 blocks of the 125M model twice in a row.

Data:   mobilellm prepare --source="text:corpus/*.txt" --vocab_size=32000 --output=data/pretrain
        (the authors have not published their mixture)
Run:    mobilellm train --config=configs/mobilellm_ls_125m.py --workdir=runs/mobilellm_ls_125m
        (add --config.train.accumulation_steps=N if 1024 sequences do not fit in memory)
Cost:   1T tokens, and about twice the FLOPs of the plain model. The authors needed about 3 days
        on 32 A100-80G for the plain model. They have not published the time for this model.
Result: the authors report a mean zero-shot accuracy of 47.0 on eight tasks (Table 10).
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import Config, DataConfig, to_config_dict
from mobilellm_jax.paper.architectures import MOBILELLM


def get_config() -> ConfigDict:
    """Returns the paper's recipe, the default: 480k steps of 1024 sequences of 2048 tokens."""
    return to_config_dict(Config(model=MOBILELLM["ls_125m"], data=DataConfig(path="data/pretrain")))
