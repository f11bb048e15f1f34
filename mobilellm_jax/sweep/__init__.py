"""A comparison as a folder of runs: planned, launched, resumed.

`runs` says which runs there are; `folder` what is kept of them; `estimate` and `chip_hours` what
they will take; `local` and `slurm` launch them, each run in a process of its own (`child`).
`report` makes tables of the folder.
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
    """Says what the sweep consists of and what has become of it."""
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
    """Runs on this machine what is not finished, with an estimate of the time first.

    Returns:
      Whether all runs finished; None if a signal stopped them, saved.

    Raises:
      ConfigError: for what cannot be run, before anything runs.
    """
    slots = find_slots(parallel)
    # A plan makes no data; without any, it knows the batches of an evaluation if the recipe does.
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
    """Submits what is not finished to Slurm.

    Raises:
      ConfigError: for what cannot be run or submitted.
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
    """Says which runs failed, and what to do next; returns whether none did."""
    failed = [r.name for r in runs if files.state_of(sweep, r.name) == "failed"]
    for name in failed:
        say(f"failed  {name}: see {files.log_file(sweep, name)}")
    if failed:
        say(f"{len(failed)} of {len(runs)} runs failed; the same command again tries them again")
    say(f"next:   mobilellm report --runs='{sweep / files.RUNS}/*' --output={sweep / 'report'}")
    return not failed


def check_data(runs: Sequence[Run]) -> dict[str, int]:
    """Checks what the runs need of their data, making it where a recipe says how.

    Children would all find the same mistake, one after the other, and make the data at once.

    Returns:
      Validation batches of one evaluation, by `data.path`.

    Raises:
      ConfigError: for a vocabulary that is not the data's, or nothing held out.
      FileNotFoundError: for missing data.
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
    """Returns seconds by name; where no trial succeeded, by FLOPs as those that did."""
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
    """Refuses what a sweep decides itself.

    Raises:
      ConfigError: for a start from a checkpoint, which has one shape.
    """
    if config.train.init_from:
        raise ConfigError(
            f"train.init_from={config.train.init_from!r}: the models of a sweep have shapes of "
            "their own; leave it empty."
        )
