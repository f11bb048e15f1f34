"""Plans, starts and resumes a sweep, which is a folder of training runs to compare."""

import logging
from collections.abc import Sequence
from pathlib import Path

from mobilellm_jax import preflight
from mobilellm_jax.config import ConfigError
from mobilellm_jax.evaluate.in_training import read_inputs
from mobilellm_jax.startup.messages import counted
from mobilellm_jax.sweep import estimate, local, slurm
from mobilellm_jax.sweep import folder as files
from mobilellm_jax.sweep.runs import Run
from mobilellm_jax.sweep.slots import find_slots

_log = logging.getLogger(__name__)


def plan(runs: Sequence[Run], sweep: Path) -> None:
    """Shows the models of the sweep and the number of runs in each state.

    Raises:
      UserError: if `sweep` cannot be the folder of a sweep.
    """
    files.check_sweep(sweep)
    for line in estimate.plan_lines(runs):
        _log.info(line)
    states = [files.state_of(sweep, run) for run in runs]
    flops = estimate.flops_in_words(sum(run.flops for run in runs))
    ended = sum(state in files.ENDED for state in states)
    _log.info(
        f"{counted(len(runs), 'run')}, {flops} in all (6 x weights x tokens + causal attention); "
        f"in {sweep}: {ended} finished, {states.count('started')} started, "
        f"{states.count('failed')} failed" + (" (to be tried again)" if "failed" in states else "")
    )


def run_here(
    runs: Sequence[Run],
    sweep: Path,
    parallel: int | None,
    flops_per_sec: float | None,
    only_plan: bool,
) -> bool | None:
    """Shows an estimate of the time, and runs the unfinished runs on this machine.

    Returns:
      True if all runs finished, False if a run failed, and None if a signal stopped the sweep after
        its runs were saved. If `only_plan` is set, the result is True.

    Raises:
      ConfigError: before the first run starts, if this machine or the data do not fit the runs.
    """
    slots = find_slots(parallel)
    # A plan prepares no data, so it takes the number of batches per evaluation from the config.
    stated = {run.name: run.config.train.eval_batches for run in runs}
    batches = stated if only_plan else check_data(runs, sweep)
    with local.alone(sweep) as lock:
        files.record_runs(sweep, runs)
        left = files.unfinished(sweep, runs)
        if flops_per_sec is None:
            speeds, source = estimate.try_all(sweep, left, slots), "as tried"
        else:
            rate, source = flops_per_sec / len(slots), f"at {flops_per_sec:.3g} FLOP/s, stated"
            speeds = {estimate.key_of(run): estimate.speed_of(run.config, rate) for run in left}
        expected = estimate.expected_seconds(runs, speeds, batches)
        ahead = estimate.seconds_ahead(sweep, left, expected)
        _log.info(
            f"about {estimate.in_words(ahead / len(slots))} on {len(slots)} x {slots[0].name} "
            f"({source}; evaluations and starts included)"
        )
        if only_plan:
            return True
        if not local.run_all(sweep, runs, slots, expected, lock):
            return None
    failed = [run.name for run in runs if files.state_of(sweep, run) == "failed"]
    for name in failed:
        _log.info(f"failed  {name}: see {files.log_file(sweep, name)}")
    if failed:
        again = "the same command tries them again"
        _log.info(f"{len(failed)} of {counted(len(runs), 'run')} failed; {again}")
    _log.info(
        f"next:   mobilellm report --runs='{sweep / files.RUNS}/*' --output={sweep / 'report'}"
    )
    return not failed


def submit(runs: Sequence[Run], sweep: Path, arguments: str, at_once: int | None) -> None:
    """Submits the unfinished runs to Slurm.

    Raises:
      ConfigError: if the data do not fit the runs, or if the submission fails.
    """
    check_data(runs, sweep)
    files.record_runs(sweep, runs)
    if left := files.unfinished(sweep, runs):
        slurm.submit(sweep, left, arguments, at_once)
    else:
        _log.info("all finished; nothing to submit")


def check_data(runs: Sequence[Run], sweep: Path) -> dict[str, int]:
    """Checks the data of all runs; returns each run's number of batches per evaluation.

    The function prepares missing data if the recipe names a source. It runs before the processes of
    the runs start, because otherwise each process would prepare the data or report the same error.

    Raises:
      ConfigError: if the vocabulary of a model differs from the vocabulary of its data, if a run
        would not train or evaluate any target, or if a run in the folder was trained on other data.
      FileNotFoundError: if data are missing and the recipe names no source.
    """
    targets: dict[tuple[object, ...], int] = {}
    fingerprints: dict[tuple[object, ...], str] = {}
    batches: dict[str, int] = {}
    for run in runs:
        train, data = run.config.train, run.config.data
        # `read_inputs` depends on the evaluations and on the length of the model's sequences.
        evaluated = (run.config.evaluate, run.config.model.max_seq_len)
        key = (data.path, data.source, data.boundaries, run.config.model.vocab_size, *evaluated)
        if key not in targets:
            mixture, tokenizer = preflight.open_data(run.config)
            read_inputs(run.config, tokenizer)
            if lines := preflight.without_targets(run.config, mixture):
                raise ConfigError("\n".join(lines))
            targets[key] = preflight.held_out_targets(run.config, mixture)
            fingerprints[key] = mixture.fingerprint
        files.check_data(sweep, run, fingerprints[key])
        if not targets[key] or not train.eval_every:
            raise ConfigError(
                f"a sweep compares validation losses: data.path={data.path!r} holds "
                f"{targets[key]} held-out targets and train.eval_every={train.eval_every}; both "
                "must be greater than 0."
            )
        whole = -(-targets[key] // run.config.tokens_per_step)
        batches[run.name] = min(whole, train.eval_batches or whole)
    return batches
