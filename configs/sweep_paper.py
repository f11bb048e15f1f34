"""Trains the models of the paper's ablation tables at the paper's sizes; `sweep` sets the shapes.

The recipe follows Liu et al. 2024 (arXiv:2402.14905), Sec. 3.1: 120,000 steps of 1024 sequences of
2048 tokens, 0.25T tokens in total. The rows of Table 10 with 1T tokens take 480,000 steps.

Data:   mobilellm prepare --source="text:corpus/*.txt" --vocab_size=32000 --output=data/pretrain
        (the authors have not published their mixture)
Run:    mobilellm sweep --grid=roadmap --scale=paper --group=125M --workdir=runs/roadmap
        (the default is --config=configs/sweep_paper.py)
Cost:   the paper's Table 16 gives 29 hours on 32 A100-80G for a model of 125M parameters, and 42
        hours for 350M. The options --plan --topology=v5e:16x16 print chip-hours on TPUs.
Result: mobilellm_jax/paper/architectures.py contains the paper's scores. We have not trained these
        models.
"""

from ml_collections import ConfigDict

from mobilellm_jax.config import to_config_dict


def get_config() -> ConfigDict:
    """Returns the recipe.

    `remat=dots` has the shortest predicted step of all policies that we compiled for v4, v5e, v5p
    and v6e (benchmarks/2026-11_tpu_compile.md).
    """
    config = to_config_dict()
    config.model.remat = "dots"
    config.data.path = "data/pretrain"
    config.train.steps = 120_000
    return config
