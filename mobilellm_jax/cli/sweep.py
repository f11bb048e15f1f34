r"""Trains many models to compare them: the paper's grids, your own values, or both.

  mobilellm sweep --grid=depth_width --workdir=runs/tiny --seeds=3
  mobilellm sweep --grid=all --workdir=runs/tiny --seeds=3 --parallel=2 --config.data.path=data/mine
  mobilellm sweep --grid=heads --workdir=runs/heads --tune_lr=1e-3,3e-3,1e-2 --seeds=3
  mobilellm sweep --config=configs/quickstart.py --sweep=model.num_blocks=2,4,8 \
      --fixed_parameters=900000 --config.model.head_dim=32 --workdir=runs/depth
  mobilellm sweep --grid=roadmap --scale=paper --group=125M --workdir=/shared/roadmap \
      --launcher=slurm --sbatch_args="--partition=gpu --gres=gpu:8 --time=24:00:00"
  mobilellm sweep --grid=heads --scale=paper --workdir=runs/plan --plan --topology=v5e:16x16

First the command prints the number of runs, their parameters and FLOPs, and an estimate of the
time. For the estimate, it trains each model for a few steps on this machine, or it uses
--flops_per_sec. With --plan, the command then stops. Otherwise it starts the runs without asking.

The same command resumes the sweep: it skips finished runs, resumes stopped runs, and tries failed
runs again. If you ask for more seeds or grids, it adds runs. A model that is in several grids is
trained once. Ctrl-C saves all runs. Each run is a folder in WORKDIR/runs, like a folder of `train`,
and the output of the run is in WORKDIR/logs.

--scale chooses the size of the models: paper (125M and 350M), small (about 20M) or tiny (1.4M
parameters). The other settings come from configs/sweep_SCALE.py or --config. A seed sets the
initial parameters and the order of the data. With --tune_lr, the first seed of every model is
trained with each learning rate, and the other seeds with the best rate only.

Exit codes: 0 if all runs finished (or were submitted or planned), 1 if a run failed, 75 if the runs
were saved and stopped.
"""

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from mobilellm_jax.cli.config_flags import CONFIG_HELP, load_recipe, parse_value
from mobilellm_jax.cli.errors import UsageError
from mobilellm_jax.cli.flags import flag
from mobilellm_jax.config import ConfigError, field_types, near_miss
from mobilellm_jax.errors import FAILED, SAVED_REQUEUE_ME
from mobilellm_jax.paper.grids import GRIDS, SCALES, GridName

T = TypeVar("T", bound=str)

_log = logging.getLogger(__name__)
# After a quoted value there must be a comma or the end of the text. Any other value ends before the
# next comma.
_VALUE = re.compile(r""" "[^"]*"(?=,|$) | '[^']*'(?=,|$) | [^,]* """, re.VERBOSE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of the command."""

    config: str | None = flag(None, f"{CONFIG_HELP} (default: configs/sweep_SCALE.py)")
    workdir: Path = flag(None, "folder of the sweep, made if missing", required=True)
    grid: list[str] = flag(
        [],
        "grids of the paper: depth_width, roadmap, embedding, heads, sharing, repeats, or all",
        commas=True,
    )
    scale: str = flag("tiny", "size of the grids' models: paper, small or tiny")
    group: str = flag("", "125M or 350M: only these rows of --scale=paper")
    sweep: list[str] = flag(
        [],
        "GROUP.FIELD=VALUE,VALUE,...: train with each value; may be repeated, for all "
        "combinations. A value with commas stands in double quotes: 'data.path=\"a:0.7,b:0.3\",c'",
    )
    fixed_parameters: int | None = flag(
        None,
        "choose the width of every model so that it has this many parameters, within 3%",
        lower_bound=1,
    )
    seeds: int = flag(1, "runs of each model", lower_bound=1)
    tune_lr: list[str] = flag([], "learning rates to choose from for every model", commas=True)
    plan: bool = flag(False, "print the plan, and stop")
    topology: str | None = flag(
        None, "with --plan: compile every model for this TPU slice and print the cost"
    )
    mfu: float = flag(
        0.3, "with --topology: assumed share of the peak", lower_bound=0.01, upper_bound=1.0
    )
    parallel: int | None = flag(
        None,
        "runs at the same time, which divide the GPUs or CPU cores; with Slurm, tasks at the same "
        "time (default: one run per GPU, or one run on all cores)",
        lower_bound=1,
    )
    flops_per_sec: float | None = flag(
        None,
        "model FLOP/s of the whole machine; replaces the trial steps",
        lower_bound=1.0,
    )
    launcher: Literal["local", "slurm"] = flag("local", "place where the runs are started")
    sbatch_args: str = flag("", "options of sbatch, for --launcher=slurm")


def main(flags: Flags, overrides: list[str]) -> int:
    """Plans or runs the sweep, and returns the exit code."""
    scale, grids = _one_of("scale", flags.scale, SCALES), _grids(flags.grid)
    fields, rates = _fields(flags.sweep), _rates(flags)
    if not grids and not fields:
        raise UsageError("--grid and --sweep are both missing; give at least one of them.")
    if flags.topology and not flags.plan:
        raise UsageError(f"--topology={flags.topology} needs --plan, since no run can start there.")
    file = flags.config
    if file is None:
        if not grids:
            raise UsageError("--config is missing; --sweep without --grid varies this recipe.")
        file = f"configs/sweep_{scale}.py"
    recipe = load_recipe(file, overrides)
    base = recipe.config
    # The import of jax is slow, so errors in the config are reported before it.
    from mobilellm_jax.sweep import plan, run_here, submit
    from mobilellm_jax.sweep.runs import grid_variants, vary, with_seeds

    if base.train.init_from:
        raise ConfigError(
            f"train.init_from={base.train.init_from!r} has the shape of one model, and the models "
            "of a sweep have different shapes; leave it empty."
        )
    variants = grid_variants(recipe, grids, scale, flags.group) if grids else {"": recipe}
    if fields or flags.fixed_parameters:
        variants = vary(variants, fields, flags.fixed_parameters)
    runs = with_seeds(variants, flags.seeds, rates)
    sweep = flags.workdir
    plan(runs, sweep)
    if flags.topology:
        from mobilellm_jax.sweep.chip_hours import price

        return 0 if price(runs, sweep, flags.topology, flags.mfu) else FAILED
    if flags.launcher == "slurm":
        if not flags.plan:
            submit(runs, sweep, flags.sbatch_args, flags.parallel)
        return 0
    done = run_here(runs, sweep, flags.parallel, flags.flops_per_sec, flags.plan)
    if done is None:
        return SAVED_REQUEUE_ME
    return 0 if done else FAILED


def _grids(asked: list[str]) -> list[GridName]:
    names = [_one_of("grid", name, (*GRIDS, "all")) for name in asked]
    return [name for name in GRIDS if name in names or "all" in names]


def _one_of(flag: str, value: str, allowed: Sequence[T]) -> T:
    for name in allowed:
        if name == value:
            return name
    hint = near_miss(value, allowed)
    raise UsageError(f"--{flag}={value} must be one of {', '.join(allowed)}.{hint}")


def _fields(asked: list[str]) -> dict[str, list[object]]:
    fields: dict[str, list[object]] = {}
    for text in asked:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise UsageError(
                f"--sweep={text} must be a field and its values: --sweep=model.num_blocks=4,8,16"
            )
        if name in fields:
            raise UsageError(f"--sweep={name} is given twice; write all its values in one flag.")
        fields[name] = [_value(text, name, value) for value in _split(text, values)]
        if field_types()[name] is str and len(fields[name]) > 1:
            _log.info(
                f"--sweep={name} has {len(fields[name])} values: "
                f"{' | '.join(map(repr, fields[name]))}. A value that contains a comma stands in "
                f"double quotes: --sweep='{name}=\"a:0.7,b:0.3\",c'"
            )
    return fields


def _value(whole: str, field: str, text: str, flag: str = "sweep") -> Any:
    """Converts one value of a flag to the type of a field; `whole` is the text of the flag."""
    try:
        return parse_value(field, text)
    except ConfigError as error:
        comma = " Remove the comma beside it." if not text else ""
        raise UsageError(f"--{flag}={whole}: {error}{comma}") from error


def _split(flag: str, values: str) -> list[str]:
    """Splits values at the commas outside quotes; a quoted value loses its quotes."""
    found, position = [], 0
    while position <= len(values):
        match = _VALUE.match(values, position)
        assert match is not None, "the last alternative matches every text"
        value = match[0]
        position = match.end() + 1
        if value[:1] in ("'", '"'):
            if len(value) < 2 or value[-1] != value[0]:
                raise UsageError(
                    f"--sweep={flag} has a value that begins with {value[0]} and does not end with "
                    "it. Between quotes, a comma belongs to the value; write the second quote."
                )
            value = value[1:-1]
        found.append(value)
    return found


def _rates(flags: Flags) -> list[float]:
    rates = []
    for text in flags.tune_lr:
        rate = _value(",".join(flags.tune_lr), "optimizer.peak_lr", text, "tune_lr")
        if rate in rates:
            raise UsageError(f"--tune_lr={','.join(flags.tune_lr)} has {text} twice.")
        rates.append(rate)
    if rates and any(text.startswith("optimizer.peak_lr=") for text in flags.sweep):
        raise UsageError("--tune_lr and --sweep=optimizer.peak_lr contradict each other.")
    return rates
