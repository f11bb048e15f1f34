"""MobileLLM-LS-125M (Liu et al. 2024, arXiv:2402.14905).

Tables 9 and 10: the 125M model, each of its 30 blocks applied twice in a row.

Data:   mobilellm prepare --source="text:corpus/*.txt" --vocab_size=32000 --output=data/pretrain
        (the authors' mixture is not published)
Run:    mobilellm train --config=configs/mobilellm_ls_125m.py --workdir=runs/mobilellm_ls_125m
        (--config.train.accumulation_steps=N where 1024 sequences do not fit at once)
Cost:   1T tokens; about twice the FLOPs of the plain model, which took the authors about
        3 days on 32 A100-80G; the time of this one is not published.
Result: mean zero-shot accuracy on the eight tasks 47.0 (Table 10).
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import Config, DataConfig, to_config_dict
from mobilellm_jax.paper.architectures import MOBILELLM


def get_config() -> ConfigDict:
    """The paper's recipe is the default: 480k steps of 1024 sequences of 2048 tokens."""
    return to_config_dict(Config(model=MOBILELLM["ls_125m"], data=DataConfig(path="data/pretrain")))
