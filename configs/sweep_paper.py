"""The recipe of the paper's ablation tables at their own sizes; `sweep` sets the shapes.

Liu et al. 2024 (arXiv:2402.14905), Sec. 3.1: 120,000 steps of 1024 sequences of 2048 tokens, 0.25T
tokens; the rows of Table 10 with 1T tokens take four times as many.

Data:   mobilellm prepare --source="text:corpus/*.txt" --vocab_size=32000 --output=data/pretrain
        (the authors' mixture is not published)
Run:    mobilellm sweep --grid=roadmap --scale=paper --group=125M --workdir=runs/roadmap
        (which reads --config=configs/sweep_paper.py)
Cost:   29 hours on 32 A100-80G for a model of 125M, 42 for one of 350M, by the paper's Table 16;
        add --plan --topology=v5e:16x16 for chip-hours on TPUs.
Result: the paper's scores stand in `architectures.py`.
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import to_config_dict


def get_config() -> ConfigDict:
    """`remat=dots` is what libtpu expects to be fastest on every chip (docs/decisions.md)."""
    config = to_config_dict()
    config.model.remat = "dots"
    config.data.path = "data/pretrain"
    config.train.steps = 120_000
    return config
