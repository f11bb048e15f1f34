import dataclasses

import pytest

from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.config.recipe import fixed
from mobilellm_jax.model.size import flops_per_token, parameter_count
from mobilellm_jax.paper.grids import GRIDS
from mobilellm_jax.sweep.runs import grid_variants, vary, with_seeds

BASE = Config()
SMALL = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, vocab_size=2048))
ONE = {"": fixed(SMALL)}


def test_rows_that_grids_share_are_one_run() -> None:
    assert len(grid_variants(fixed(SMALL), GRIDS, "tiny")) == 20
    names = list(grid_variants(fixed(SMALL), ["sharing", "repeats"], "tiny"))
    assert names == [
        "4x128-h8kv8-f400",
        *(f"4x128-h8kv8-f400-{order}" for order in ("immediate2", "repeat_all2", "reverse2")),
        *(f"4x128-h8kv8-f400-immediate{repeats}" for repeats in (3, 4)),
    ]


def test_a_row_says_the_shape_and_the_recipe_the_rest() -> None:
    model = dataclasses.replace(BASE.model, init_std=0.1, remat="dots", scan_unroll=9)
    base = dataclasses.replace(BASE, model=model)
    variants = grid_variants(fixed(base), ["roadmap"], "paper", "125M")
    relu = variants["12x768-h12kv12-f3072-relu"].config
    assert (relu.model.activation, relu.model.num_blocks) == ("relu", 12)
    assert (relu.model.init_std, relu.model.remat, relu.model.scan_unroll) == (0.1, "dots", 9)
    assert relu.train == BASE.train
    long = variants["30x576-h9kv3-f1536-tied-immediate2-long4"].config
    assert long.train.steps == 4 * BASE.train.steps


def test_fields_are_combined() -> None:
    fields = {"model.num_blocks": [4, 8], "optimizer.peak_lr": [1e-3, 2e-3, 3e-3]}
    variants = vary(ONE, fields)
    assert len(variants) == 6
    assert next(iter(variants)) == "num_blocks=4-peak_lr=0.001"
    assert {(v.config.model.num_blocks, v.config.optimizer.peak_lr) for v in variants.values()} == {
        (blocks, rate) for blocks in (4, 8) for rate in (1e-3, 2e-3, 3e-3)
    }


def test_a_fixed_number_of_parameters() -> None:
    variants = vary(ONE, {"model.num_blocks": [2, 4, 8]}, 3_000_000)
    counts = [parameter_count(v.config.model) for v in variants.values()]
    assert all(abs(count / 3_000_000 - 1) <= 0.03 for count in counts)
    widths_stay = vary(ONE, {"model.num_blocks": [2, 4, 8]})
    free = [parameter_count(v.config.model) for v in widths_stay.values()]
    assert max(free) > 2 * min(free)


def test_what_contradicts_itself() -> None:
    with pytest.raises(ConfigError, match="--sweep=model.ffn_dim and --fixed_parameters=1000"):
        vary(ONE, {"model.ffn_dim": [8]}, 1000)
    with pytest.raises(ConfigError, match=r"--sweep=model.num_kv_heads=4: model.num_heads=9 must"):
        vary(ONE, {"model.num_kv_heads": [4]})
    with pytest.raises(ConfigError, match="twice"):
        vary(ONE, {"model.num_blocks": [4, 4]})
    with pytest.raises(ConfigError, match="--group=125m must be 125M or 350M"):
        grid_variants(fixed(BASE), GRIDS, "paper", "125m")
    with pytest.raises(ConfigError, match="embedding have no rows of this group"):
        grid_variants(fixed(BASE), ["embedding"], "paper", "350M")


def test_names_are_folders() -> None:
    (name,) = vary(ONE, {"data.path": ["a/b:0.7,../c"]})
    assert name == "path=a_b_0.7_.._c"


def test_seeds_vary_weights_and_data() -> None:
    variants = grid_variants(fixed(SMALL), ["embedding"], "tiny")
    runs = with_seeds(variants, 2)
    assert [run.name.rpartition("-")[2] for run in runs] == ["s0"] * 3 + ["s1"] * 3
    assert len({run.name for run in runs}) == 6
    seeds = [(run.config.train.seed, run.config.data.seed) for run in runs]
    assert seeds == [(0, 0)] * 3 + [(1, 1)] * 3
    assert [r.config.model for r in runs[:3]] == [r.config.model for r in runs[3:]]


def test_the_first_seed_chooses_the_learning_rate() -> None:
    runs = with_seeds(vary(ONE, {"model.num_blocks": [2, 3]}), 3, [1e-3, 1e-2])
    assert len(runs) == 2 * 2 + 2 * 2
    first = [run for run in runs if run.config.train.seed == 0]
    assert [run.config.optimizer.peak_lr for run in first] == [1e-3, 1e-2] * 2
    assert all(not run.tune_from for run in first)
    late = [run for run in runs if run.config.train.seed]
    assert late[0].tune_from == ("num_blocks=2-lr0.001-s0", "num_blocks=2-lr0.01-s0")
    assert {name for run in late for name in run.tune_from} == {run.name for run in first}


def test_flops_of_a_run() -> None:
    (run,) = with_seeds({"a": fixed(BASE)}, 1)
    assert run.flops == 480_000 * 1024 * 2048 * flops_per_token(BASE.model, 2048)
