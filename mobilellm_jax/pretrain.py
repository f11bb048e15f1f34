"""One training run, told from top to bottom.

Data, preflight, mesh, state (fresh, from another checkpoint, or resumed), loop. The same call on
the same folder resumes: the data position is the global sample index, so the run goes on with the
very batches that an uninterrupted one would have seen, on whatever devices there are now.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from mobilellm_jax import announce, checkpoint, preflight
from mobilellm_jax.config import Config, ConfigError
from mobilellm_jax.data.loader import train_batches
from mobilellm_jax.data.mixture import Mixture
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.evaluate.in_training import Evaluator, make_evaluator
from mobilellm_jax.evaluate.validation import make_validator
from mobilellm_jax.generation.generate import generate
from mobilellm_jax.generation.sampling import Sampling
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.open_model import open_model
from mobilellm_jax.processes import distributed
from mobilellm_jax.processes.run_lock import RunLock
from mobilellm_jax.quantize.training import derivation, training_transform
from mobilellm_jax.sharding import Rules, local_rows, place, put_batch
from mobilellm_jax.startup.host_memory import keep_freed_memory
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.train.loop import Hooks, Outcome, train_loop
from mobilellm_jax.train.metrics import MetricsWriter, SilentWriter, read_metrics
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.plots import plot_losses
from mobilellm_jax.train.profiler import ProfiledSteps, Profiler
from mobilellm_jax.train.state import TrainState, abstract_state, init_state, is_finite
from mobilellm_jax.train.step import TrainStep, Transform, make_train_step
from mobilellm_jax.train.stopping import Walltime

_SAMPLE_TOKENS = 64


class TrainingDivergedError(RuntimeError):
    """Steps stay non-finite, also after the run went back to its last good checkpoint."""


def pretrain(
    config: Config,
    workdir: Path,
    profile: ProfiledSteps | None = None,
    walltime: Walltime | None = None,
) -> bool:
    """Trains, or goes on training, the run in `workdir`, profiling the steps `profile`.

    After `train.max_bad_steps` steps that are not finite, it goes back to the last good checkpoint,
    once: going back to the same one a second time would show the same again. The folder is this
    run's alone while it lasts.

    Returns:
      Whether the run reached `train.steps`; False if a signal or `walltime` stopped it, saved.

    Raises:
      TrainingDivergedError: if that did not help.
      ConfigError: for what config and files or devices do not agree on, before any compile.
      FileNotFoundError: for missing data.
    """
    with distributed.telling_failures(), contextlib.ExitStack() as stack:
        lock = RunLock(workdir)
        with distributed.together("taking the run folder"):
            preflight.check_writable(workdir)
            if distributed.is_first():
                stack.enter_context(lock)
        return _pretrain(config, workdir, profile, walltime, lock)


def _pretrain(
    config: Config,
    workdir: Path,
    profile: ProfiledSteps | None,
    walltime: Walltime | None,
    lock: RunLock,
) -> bool:
    with distributed.together("checking the run"):
        resume_step: int | None = distributed.from_first(
            "the latest checkpoint", lambda: checkpoint.latest_step(workdir)
        )
        config = preflight.settle(config, workdir, resume_step)
        if profile is not None:
            profile.check(resume_step or 0, config.train.steps)
        mixture = preflight.open_or_prepare(config)
        tokenizer = load_tokenizer(mixture.tokenizer)
        mesh, rules = preflight.check(config, mixture, tokenizer)
        evaluator = make_evaluator(config, tokenizer, mesh, rules)
        start = preflight.data_state(config, mixture, workdir, resume_step)
        start_params = _initial_params(config, tokenizer) if resume_step is None else None
    with distributed.together("verifying the data", preflight.VERIFY_SEC):
        preflight.verify(config, mixture)
    with distributed.together("starting the run folder"):
        preflight.record(config, tokenizer, workdir)

    if jax.default_backend() == "cpu":
        keep_freed_memory()

    optimizer = make_optimizer(config.optimizer, config.train.steps)
    abstract = abstract_state(config, optimizer, mesh, rules)
    announce.start(config, mixture, mesh, abstract, resume_step)
    with checkpoint.CheckpointWriter(workdir, config, tokenizer, lock.check) as checkpoints:
        if resume_step is not None:
            state = checkpoints.restore(resume_step, abstract)
        else:
            state = init_state(config, optimizer, mesh, rules)
            if start_params is not None:
                placed = jax.tree.map(place, start_params, abstract.params)
                state = dataclasses.replace(state, params=placed)
        resumed_at = int(state.step)
        transform, derive = training_transform(config), derivation(config)
        step_fn: TrainStep = make_train_step(config, optimizer, mesh, rules, state, transform)
        validate = _validator(config, mixture, mesh, rules, workdir, derive)

        def data_after(step: int) -> checkpoint.DataState:
            samples = (step - resumed_at) * config.train.global_batch
            return dataclasses.replace(start, next_sample=start.next_sample + samples)

        def train_from(state: TrainState) -> tuple[TrainState, Outcome]:
            first_step = int(state.step)
            batches = train_batches(
                mixture,
                config.data,
                global_batch=config.train.global_batch,
                first_sample=data_after(first_step).next_sample,
                num_batches=config.train.steps - first_step,
                rows=local_rows(mesh, config.train.global_batch),
            )
            if distributed.is_first():
                _cut_samples(workdir, first_step)
                writer = MetricsWriter(workdir, first_step, config.train.steps)
            else:
                writer = SilentWriter()
            with writer, contextlib.ExitStack() as stack:
                hooks = Hooks(
                    put=functools.partial(
                        put_batch, mesh=mesh, global_batch=config.train.global_batch
                    ),
                    save=lambda step, state: checkpoints.save(step, state, data_after(step)),
                    finish_saving=checkpoints.wait,
                    save_again=checkpoints.save_again,
                    validate=validate,
                    sample=functools.partial(
                        _look, config, tokenizer, workdir, evaluator, writer, derive
                    ),
                    agree=distributed.Agreement(first_step),
                )
                profiled = step_fn
                if profile is not None and distributed.is_first():
                    profiler = Profiler(step_fn, profile, first_step, workdir / rundir.PROFILE)
                    profiled = stack.enter_context(profiler)
                return train_loop(config, state, profiled, batches, hooks, writer, walltime)

        state, outcome = train_from(state)
        back_at: int | None = None
        while outcome.bad is not None:
            del state  # there may be no room for two
            found = _newest_good(checkpoints, workdir, abstract)
            if found is None or int(found.step) == back_at:
                raise TrainingDivergedError(
                    announce.divergence(config, workdir, outcome.bad, back_at)
                )
            back_at = int(found.step)
            announce.going_back(outcome.bad, back_at)
            checkpoints.forget_after(back_at)
            state, outcome = train_from(found)
    _plot(workdir)
    finished = outcome.kind == "finished"
    announce.end(workdir, finished)
    return finished


def _newest_good(
    checkpoints: checkpoint.CheckpointWriter, workdir: Path, abstract: TrainState
) -> TrainState | None:
    """Returns the newest saved state from which the run can heal, or None.

    One that a signal made the run save between bad steps is not, nor is one that was damaged
    before it was saved.
    """
    checkpoints.wait()
    steps: list[int] = distributed.from_first(
        "the checkpoints", lambda: checkpoint.whole_steps(workdir)
    )
    for step in reversed(steps):
        state = checkpoints.restore(step, abstract)
        if int(state.bad_steps) == 0 and is_finite(state):
            return state
        del state
    return None


def _initial_params(config: Config, tokenizer: Tokenizer) -> Params | None:
    """Returns the parameters of `train.init_from`, checked against the model, or None."""
    if not config.train.init_from:
        return None
    opened = open_model(config.train.init_from)
    theirs, ours = dataclasses.asdict(opened.config), dataclasses.asdict(config.model)
    free = ("attention", "init_std", "remat", "scan_unroll", "compute_dtype", "max_seq_len")
    different = [
        f"  model.{name}: {theirs[name]!r} there, {ours[name]!r} here"
        for name in ours
        if theirs[name] != ours[name] and name not in free
    ]
    if opened.tokenizer.sha256 != tokenizer.sha256:
        different.append(f"  tokenizer: {opened.tokenizer.file} there, {tokenizer.file} here")
    if different:
        raise ConfigError(
            f"train.init_from={config.train.init_from!r} is another model:\n" + "\n".join(different)
        )
    params: Params = opened.params
    return params


def _validator(
    config: Config,
    mixture: Mixture,
    mesh: Mesh,
    rules: Rules,
    workdir: Path,
    derive: Transform,
) -> Callable[[TrainState], Mapping[str, float]]:
    validator = make_validator(config, mixture, mesh, rules)

    def validate(state: TrainState) -> Mapping[str, float]:
        values = validator(derive(state.params))
        if int(state.step):
            _plot(workdir)
        return values

    return validate


def _look(
    config: Config,
    tokenizer: Tokenizer,
    workdir: Path,
    evaluator: Evaluator,
    writer: MetricsWriter,
    derive: Transform,
    step: int,
    state: TrainState,
) -> None:
    """Samples texts and scores tasks, with the parameters where they are."""
    params = derive(state.params)
    _write_samples(config, tokenizer, workdir, step, params, state.key_data)
    values = evaluator(params)
    if values:
        writer.write(step, values)
        shown = "  ".join(f"{k.removeprefix('evaluate/')} {v:.4f}" for k, v in values.items())
        writer.message(f"step {step}: {shown}")


def _write_samples(
    config: Config,
    tokenizer: Tokenizer,
    workdir: Path,
    step: int,
    params: Params,
    key_data: jax.Array,
) -> None:
    count = config.evaluate.samples
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), step)
    seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max))
    texts = generate(
        config.model,
        params,
        [[tokenizer.bos_id]] * count,
        max_new_tokens=min(_SAMPLE_TOKENS, config.model.max_seq_len - 1),
        sampling=Sampling(seed=seed),
        eos_id=tokenizer.eos_id,
    )
    if not distributed.is_first():
        return
    with (workdir / rundir.SAMPLES).open("a", encoding="utf-8") as file:
        for ids in texts:
            file.write(json.dumps({"step": step, "text": tokenizer.decode(ids)}) + "\n")


def _cut_samples(workdir: Path, first_step: int) -> None:
    path = workdir / rundir.SAMPLES
    if path.exists():
        records = strict_json.read_lines(path)
        kept = [r for r in records if strict_json.get(r, "step", int, name=str(path)) < first_step]
        rundir.write_whole(path, "".join(json.dumps(r) + "\n" for r in kept))


def _plot(workdir: Path) -> None:
    if distributed.is_first():
        records = read_metrics(workdir / rundir.METRICS)
        plot_losses(records, workdir / rundir.LOSS_PLOT, workdir.name)
