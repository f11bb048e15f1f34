"""Plans, launches and resumes a sweep: a folder of training runs that are compared.

`runs` lists the runs, and `folder` reads and writes the files of the sweep. `estimate` predicts the
time on this machine, and `chip_hours` predicts the cost on TPUs. `local` and `slurm` launch the
runs, and `child` is the process of one run. `report` makes tables from the folder.
"""

from collections.abc import Sequence
from pathlib import Path

from mobilellm_jax import preflight
from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.data.sources.source import VALIDATION
from mobilellm_jax.data.windows import count_targets
from mobilellm_jax.sweep import estimate, local, slurm
from mobilellm_jax.sweep import folder as files
from mobilellm_jax.sweep.estimate import Say, Speed
from mobilellm_jax.sweep.local import in_words
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.sweep.slots import find_slots


def plan(runs: Sequence[Run], sweep: Path, say: Say) -> None:
    """Prints the models of the sweep and the number of runs in each state."""
    for line in estimate.plan_lines(runs):
        say(line)
    states = [files.state_of(sweep, run.name, run.config.train.steps) for run in runs]
    say(
        f"{len(runs)} runs, {sum(run.flops for run in runs) / 1e15:,.3f} PFLOP in all (6 x weights "
        f"x tokens + causal attention); in {sweep}: {states.count('finished')} finished, "
        f"{states.count('started')} started, {states.count('failed')} failed"
        + (" (to be tried again)" if "failed" in states else "")
    )


def run_here(
    runs: Sequence[Run],
    sweep: Path,
    parallel: int | None,
    flops_per_sec: float | None,
    only_plan: bool,
    say: Say,
) -> bool | None:
    """Prints an estimate of the time, and runs the unfinished runs on this machine.

    Returns:
      True if all runs finished, False if a run failed, and None if a signal stopped the sweep after
        its runs were saved. With `only_plan`, True.

    Raises:
      ConfigError: if the runs cannot start on this machine or with this data. The checks come
        before the first run starts.
    """
    slots = find_slots(parallel)
    # A plan does not prepare data, so it takes the number of validation batches from the recipe.
    batches = _stated_batches(runs) if only_plan else check_data(runs)
    with local.alone(sweep, say) as lock:
        files.record_runs(sweep, runs)
        left = [r for r in runs if not _finished(sweep, r)]
        if flops_per_sec is None:
            speeds = estimate.try_all(sweep, left, slots, say)
        else:
            speeds = {
                estimate.key_of(run): estimate.speed_of(run.config, flops_per_sec / len(slots))
                for run in left
            }
        expected = _expected(runs, speeds, batches)
        ahead = sum(
            expected[run.name]
            * (1 - files.last_step(files.run_folder(sweep, run.name)) / run.config.train.steps)
            for run in left
        )
        source = "as tried" if flops_per_sec is None else f"at {flops_per_sec:.3g} FLOP/s, stated"
        say(
            f"about {in_words(ahead / len(slots))} on {len(slots)} x {slots[0].name} ({source}; "
            "evaluations and starts included)"
        )
        if only_plan:
            return True
        if not local.run_all(sweep, runs, slots, expected, lock, say):
            return None
    return report_states(runs, sweep, say)


def submit(runs: Sequence[Run], sweep: Path, arguments: str, at_once: int | None, say: Say) -> None:
    """Submits the unfinished runs to Slurm.

    Raises:
      ConfigError: if the data do not fit the runs, or if the submission fails.
    """
    check_data(runs)
    files.record_runs(sweep, runs)
    left = [run for run in runs if not _finished(sweep, run)]
    if not left:
        say("all finished; nothing to submit")
        return
    for line in slurm.submit(sweep, left, arguments, at_once):
        say(line)


def report_states(runs: Sequence[Run], sweep: Path, say: Say) -> bool:
    """Prints the failed runs and the next command; returns True if no run failed."""
    failed = [r.name for r in runs if files.state_of(sweep, r.name) == "failed"]
    for name in failed:
        say(f"failed  {name}: see {files.log_file(sweep, name)}")
    if failed:
        say(f"{len(failed)} of {len(runs)} runs failed; the same command again tries them again")
    say(f"next:   mobilellm report --runs='{sweep / files.RUNS}/*' --output={sweep / 'report'}")
    return not failed


def check_data(runs: Sequence[Run]) -> dict[str, int]:
    """Checks the data of all runs, and prepares missing data if the recipe names a source.

    The check runs once, before the processes of the runs start. Otherwise every process would
    report the same mistake, and several processes would prepare the data at the same time.

    Returns:
      The number of validation batches of one evaluation, by `data.path`.

    Raises:
      ConfigError: if the vocabulary of a model differs from the vocabulary of its data, or if a run
        would not evaluate any held-out target.
      FileNotFoundError: if data are missing and the recipe names no source.
    """
    batches: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    for run in runs:
        config = run.config
        key = (config.data.path, config.model.vocab_size)
        if key in seen:
            continue
        seen.add(key)
        mixture, _ = preflight.open_data(config)
        held_out = [stream for c in mixture.components if (stream := c.stream(VALIDATION))]
        targets = sum(count_targets(stream, config.data.boundaries) for stream in held_out)
        if not targets or not config.train.eval_every:
            raise ConfigError(
                f"a sweep compares validation losses: data.path={config.data.path!r} holds "
                f"{targets} held-out targets and train.eval_every={config.train.eval_every}; both "
                "must be greater than 0."
            )
        tokens = config.train.global_batch * config.data.seq_len
        whole = -(-targets // tokens)
        most = config.train.eval_batches or whole
        batches[config.data.path] = min(whole, most)
    return batches


def _stated_batches(runs: Sequence[Run]) -> dict[str, int]:
    return {run.config.data.path: run.config.train.eval_batches for run in runs}


def _expected(
    runs: Sequence[Run], speeds: dict[str, Speed], batches: dict[str, int]
) -> dict[str, float]:
    """Returns the expected seconds of each run, by the name of the run.

    If the trial of a model failed, its seconds are computed from its FLOPs, at the mean rate of the
    other runs.
    """
    known = {
        run.name: speeds[key].seconds(run.config, batches[run.config.data.path])
        for run in runs
        if (key := estimate.key_of(run)) in speeds
    }
    flops = sum(run.flops for run in runs if run.name in known)
    per_flop = sum(known.values()) / flops if flops else 1e-10
    return {run.name: known.get(run.name, run.flops * per_flop) for run in runs}


def _finished(sweep: Path, run: Run) -> bool:
    return files.state_of(sweep, run.name, run.config.train.steps) == "finished"


def check_config(config: Config) -> None:
    """Refuses a setting that a sweep cannot use.

    Raises:
      ConfigError: if `train.init_from` is set. A checkpoint has one shape, and a sweep has several.
    """
    if config.train.init_from:
        raise ConfigError(
            f"train.init_from={config.train.init_from!r}: the models of a sweep have shapes of "
            "their own; leave it empty."
        )
