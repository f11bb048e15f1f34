r"""Trains many models to compare them: a grid of the paper, or values of your own, or both.

  mobilellm sweep --grid=depth_width --workdir=runs/tiny --seeds=3
  mobilellm sweep --grid=all --workdir=runs/tiny --seeds=3 --parallel=2 --config.data.path=data/mine
  mobilellm sweep --grid=heads --workdir=runs/heads --tune_lr=1e-3,3e-3,1e-2 --seeds=3
  mobilellm sweep --config=configs/quickstart.py --sweep=model.num_blocks=2,4,8 \
      --sweep=optimizer.peak_lr=1e-2,2e-2 --fixed_parameters=900000 --workdir=runs/depth
  mobilellm sweep --grid=roadmap --scale=paper --group=125M --workdir=/shared/roadmap \
      --launcher=slurm --sbatch_args="--partition=gpu --gres=gpu:8 --time=24:00:00"
  mobilellm sweep --grid=heads --scale=paper --workdir=runs/plan --plan --topology=v5e:16x16

First it says how many runs there are, their parameters and FLOPs, and how long they will take,
from some steps of each model here or from --flops_per_sec; --plan ends there. It asks nothing. The
same command again goes on: finished runs are not repeated, stopped ones resume, failed ones are
tried again, and more seeds or grids add runs. Rows that several grids share are one run. Ctrl-C
saves all. Runs are folders as `train` makes them, in WORKDIR/runs, their output is in WORKDIR/logs.

Scales: paper (125M and 350M), small (about 20M), tiny (1.4M). Recipes: configs/sweep_SCALE.py, or
--config. Seeds vary initialisation and the order of the data. With --tune_lr the first seed of
every model is trained at each learning rate, the other seeds at its best.

Exit codes: 0 all finished (or submitted, or planned), 1 some failed, 75 stopped and saved.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from mobilellm_jax.cli.config_flags import load_config, parse_value
from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.config import near_miss
from mobilellm_jax.errors import SAVED_REQUEUE_ME
from mobilellm_jax.paper.grids import GRIDS, SCALES, GridName, ScaleName

if TYPE_CHECKING:
    from mobilellm_jax.sweep.runs import Run

_FAILED = 1
_MFU = 0.3

_CONFIG = flags.DEFINE_string(
    "config", None, "recipe, configs/NAME.py; without one configs/sweep_SCALE.py"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the sweep, made if missing", required=True
)
_GRID = flags.DEFINE_list(
    "grid",
    [],
    "grids of the paper: depth_width, roadmap, embedding, heads, sharing, repeats, or all",
)
_SCALE = flags.DEFINE_string("scale", "tiny", "size of the grids' models: paper, small or tiny")
_GROUP = flags.DEFINE_string("group", "", "125M or 350M: only these rows, at --scale=paper")
_SWEEP = flags.DEFINE_multi_string(
    "sweep", [], "GROUP.FIELD=VALUE,VALUE,...: train with each; repeated, with all combinations"
)
_PARAMETERS = flags.DEFINE_integer(
    "fixed_parameters",
    None,
    "solve the width of every model for so many parameters, within 3%",
    lower_bound=1,
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "runs of each model", lower_bound=1)
_TUNE = flags.DEFINE_list("tune_lr", [], "learning rates to choose from for every model")
_PLAN = flags.DEFINE_bool("plan", False, "say what would be run, and stop")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "with --plan: compile every model for this TPU slice and say what it costs"
)
_MFU_FLAG = flags.DEFINE_float(
    "mfu", _MFU, "with --topology: the share of the peak that is assumed", 0.01, 1.0
)
_PARALLEL = flags.DEFINE_integer(
    "parallel",
    None,
    "runs at once, dividing the GPUs or CPU cores (Slurm: tasks at once); without it one a GPU, or "
    "one on all cores",
    lower_bound=1,
)
_FLOPS = flags.DEFINE_float(
    "flops_per_sec", None, "model FLOPs of the whole machine, instead of trying some steps", 1.0
)
_LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "where the runs are")
_SBATCH = flags.DEFINE_string("sbatch_args", "", "for --launcher=slurm: options of sbatch")


def main(argv: list[str]) -> int:
    """Sweeps."""
    scale, grids, fields, rates = _scale(), _grids(), _fields(), _rates()
    if not grids and not fields:
        raise UsageError("--grid or --sweep is missing: what is to be compared?")
    if _TOPOLOGY.value and not _PLAN.value:
        raise UsageError(f"--topology={_TOPOLOGY.value} needs --plan; nothing can run there.")
    file = _CONFIG.value
    if file is None:
        if not grids:
            raise UsageError("--config is missing: the recipe that --sweep varies.")
        file = f"configs/sweep_{scale}.py"
    base = load_config(file, argv[1:])
    # Only now, so that --help and a mistake in the config are answered at once.
    from mobilellm_jax import preflight
    from mobilellm_jax.sweep import check_config, plan, run_here, submit
    from mobilellm_jax.sweep.runs import Variant, grid_variants, vary, with_seeds

    sweep = preflight.local_workdir(_WORKDIR.value)
    check_config(base)
    variants = [Variant(name="", config=base)]
    if grids:
        variants = grid_variants(base, grids, scale, _GROUP.value)
    if fields or _PARAMETERS.value:
        variants = vary(variants, fields, _PARAMETERS.value)
    runs = with_seeds(variants, _SEEDS.value, rates)
    plan(runs, sweep, _say)
    if _TOPOLOGY.value:
        return _price(runs, sweep, _TOPOLOGY.value)
    if _LAUNCHER.value == "slurm":
        if not _PLAN.value:
            submit(runs, sweep, _SBATCH.value, _PARALLEL.value, _say)
        return 0
    done = run_here(runs, sweep, _PARALLEL.value, _FLOPS.value, _PLAN.value, _say)
    if done is None:
        return SAVED_REQUEUE_ME
    return 0 if done else _FAILED


def _price(runs: "list[Run]", sweep: Path, topology_name: str) -> int:
    import jax

    from mobilellm_jax.plan.topology import parse_topology
    from mobilellm_jax.storage import rundir
    from mobilellm_jax.sweep.chip_hours import price_all, price_table

    jax.config.update("jax_platforms", "cpu")  # nothing runs: an attached TPU stays free
    topology = parse_topology(topology_name)
    sweep.mkdir(parents=True, exist_ok=True)
    name = topology.name.replace(":", "-")
    prices = price_all(runs, topology, sweep / f"compiled-{name}.json", _say)
    table = "\n".join(price_table(prices, topology, _MFU_FLAG.value))
    rundir.write_whole(sweep / f"chip-hours-{name}.md", table + "\n")
    print(table)
    return 0 if all(price.compiled.peak_bytes for price in prices) else _FAILED


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _scale() -> ScaleName:
    for name in SCALES:
        if name == _SCALE.value:
            return name
    hint = near_miss(_SCALE.value, SCALES)
    raise UsageError(f"--scale={_SCALE.value} must be one of {', '.join(SCALES)}.{hint}")


def _grids() -> list[GridName]:
    for name in _GRID.value:
        if name not in (*GRIDS, "all"):
            hint = near_miss(name, GRIDS)
            raise UsageError(f"--grid={name} must be one of {', '.join(GRIDS)}, or all.{hint}")
    return [name for name in GRIDS if name in _GRID.value or "all" in _GRID.value]


def _fields() -> dict[str, list[object]]:
    fields: dict[str, list[object]] = {}
    for text in _SWEEP.value:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise UsageError(
                f"--sweep={text} must be a field and its values: --sweep=model.num_blocks=4,8,16"
            )
        if name in fields:
            raise UsageError(f"--sweep={name} is given twice; write all its values in one.")
        fields[name] = [parse_value(name, value) for value in values.split(",")]
    return fields


def _rates() -> list[float]:
    rates = []
    for text in _TUNE.value:
        rate = parse_value("optimizer.peak_lr", text)
        if rate in rates:
            raise UsageError(f"--tune_lr={','.join(_TUNE.value)} has {text} twice.")
        rates.append(rate)
    if rates and any(text.startswith("optimizer.peak_lr=") for text in _SWEEP.value):
        raise UsageError("--tune_lr and --sweep=optimizer.peak_lr contradict each other.")
    return rates
