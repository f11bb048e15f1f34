"""One training run, from top to bottom.

`pretrain` locks the run folder, prepares everything that the run needs (`preflight.py`) and trains.
The same call on the same folder resumes the run. A checkpoint stores the position in the data as a
sample index over all processes. So a resumed run reads the same batches as an uninterrupted run, on
any number of devices.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from mobilellm_jax import announce, checkpoint, preflight
from mobilellm_jax.checkpoint import CheckpointWriter, DataState
from mobilellm_jax.config import Config
from mobilellm_jax.data.loader import train_batches
from mobilellm_jax.data.tokenizers.tokenizer import prompt_ids
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate.in_training import make_validator
from mobilellm_jax.generation.generate import Request, generate
from mobilellm_jax.generation.sampling import Sampling
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.plan.memory import shortage_after
from mobilellm_jax.preflight import Ready
from mobilellm_jax.processes import distributed
from mobilellm_jax.processes.agreement import Agreement
from mobilellm_jax.processes.run_lock import RunLock
from mobilellm_jax.quantize.parameters import derivation, training_transform
from mobilellm_jax.sharding import local_rows, place, put_batch
from mobilellm_jax.startup.host_memory import keep_freed_memory
from mobilellm_jax.startup.messages import keep_messages
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.train.loop import Hooks, train_loop
from mobilellm_jax.train.metrics import MetricsWriter, plot_losses, read_metrics
from mobilellm_jax.train.optimizer import make_optimizer, updates_made
from mobilellm_jax.train.profiler import ProfiledSteps, profiled
from mobilellm_jax.train.side_records import AppendedFile, SideRecords
from mobilellm_jax.train.state import TrainState, abstract_state, init_state, is_finite
from mobilellm_jax.train.step import TrainStep, make_train_step
from mobilellm_jax.train.stopping import Walltime

_SAMPLE_TOKENS = 64
_DRAW_EVERY_SEC = 60.0


class TrainingDivergedError(RuntimeError):
    """Steps have nan or inf, and a return to the last good checkpoint did not help."""


class OutOfMemoryError(UserError):
    """A device has too little memory for the run; the message names a change that needs less."""


def pretrain(
    config: Config,
    workdir: Path,
    profile: ProfiledSteps | None = None,
    walltime: Walltime | None = None,
    *,
    change_learning_rate: bool = False,
) -> bool:
    """Starts or resumes the run in `workdir`; no other run can use the folder at the same time.

    After `train.max_bad_steps` consecutive steps with nan or inf, the run returns to its last good
    checkpoint. It returns there only once, because a second return would repeat the same steps.

    Returns:
      True if the run reached `train.steps`; False if it saved and ended on a signal or `walltime`.

    Raises:
      TrainingDivergedError: if steps have nan or inf again after the return.
      UserError: if `settle_run` raises it, which happens before anything compiles.
    """
    with distributed.telling_failures(), contextlib.ExitStack() as stack:
        lock = RunLock(workdir)
        with distributed.together("taking the run folder"):
            preflight.take_workdir(workdir)
            if distributed.is_first():
                stack.enter_context(lock)
        ready = preflight.settle_run(
            config, workdir, profile, change_learning_rate=change_learning_rate
        )
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        folder = functools.partial(_run_folder, lock, ready)
        stack.enter_context(keep_messages(lambda: lock.last_folder / rundir.MESSAGES))
        run = _Run(ready, folder, profile, walltime or Walltime())
        announce.start(ready.config, ready.mixture, ready.mesh, run.abstract, ready.resume_step)
        with (
            _explaining_out_of_memory(ready.config),
            CheckpointWriter(workdir, ready.config, ready.tokenizer, folder) as checkpoints,
        ):
            finished = run.train(checkpoints)
        run.tell_the_end(finished)
        return finished


@contextlib.contextmanager
def _explaining_out_of_memory(config: Config) -> Iterator[None]:
    """Turns jax's error about too little memory into one that names a change of the config."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        missing = shortage_after(config, jax.devices())
        first_line = str(error).partition("\n")[0]
        raise OutOfMemoryError(f"{first_line}\nBy count, {missing}") from error


def _run_folder(lock: RunLock, ready: Ready) -> Path:
    """Returns the run folder, which somebody may have renamed; if it was deleted, creates it again.

    Only process 0 calls this function, because it holds the lock and writes the files.
    """
    folder = lock.folder()
    if not (folder / rundir.CONFIG).exists():
        checkpoint.write_config(ready.config, ready.tokenizer, folder)
    return folder


class _Run:
    def __init__(
        self,
        ready: Ready,
        folder: Callable[[], Path],
        profile: ProfiledSteps | None,
        walltime: Walltime,
    ) -> None:
        self._ready, self._config = ready, ready.config
        self._folder, self._profile, self._walltime = folder, profile, walltime
        self._side = SideRecords()
        self._drawn_at = time.monotonic()
        self._optimizer = make_optimizer(self._config.optimizer, self._config.train.steps)
        self.abstract = abstract_state(self._config, self._optimizer, ready.mesh, ready.rules)
        self._derive = derivation(self._config)
        self._validator = make_validator(self._config, ready.mixture, ready.mesh, ready.rules)

    def train(self, checkpoints: CheckpointWriter) -> bool:
        state = self._first_state(checkpoints)
        self._step_fn = make_train_step(
            self._config,
            self._optimizer,
            self._ready.mesh,
            self._ready.rules,
            state,
            training_transform(self._config),
        )
        state, bad = self._train_from(state, checkpoints)
        back_at: int | None = None
        while bad:
            del state  # The devices may lack memory for two states.
            found = self._newest_good(checkpoints)
            if found is None or int(found.step) == back_at:
                folder = distributed.from_first("the run folder", lambda: str(self._folder()))
                raise TrainingDivergedError(
                    announce.divergence(self._config, Path(folder), bad, back_at)
                )
            back_at = int(found.step)
            announce.going_back(bad, back_at)
            checkpoints.forget_after(back_at)
            state, bad = self._train_from(found, checkpoints)
        return int(state.step) >= self._config.train.steps

    def tell_the_end(self, finished: bool) -> None:
        if distributed.is_first():
            self._plot()
            with self._side.attempt("the summary at the end"):
                announce.end(self._folder(), finished, self._side.failed)

    def _plot(self) -> None:
        self._drawn_at = time.monotonic()
        if distributed.is_first():
            with self._side.attempt(f"drawing {rundir.LOSS_PLOT}"):
                folder = self._folder()
                records = read_metrics(folder / rundir.METRICS)
                plot_losses(records, folder / rundir.LOSS_PLOT, folder.resolve().name)

    def _first_state(self, checkpoints: CheckpointWriter) -> TrainState:
        ready = self._ready
        if ready.resume_step is not None:
            state = checkpoints.restore(ready.resume_step, self.abstract)
            if ready.before is not None:
                announce.changed_rate(
                    ready.before, self._config, int(updates_made(state.optimizer))
                )
            return state
        state = init_state(self._config, self._optimizer, ready.mesh, ready.rules)
        if ready.params is not None:
            placed = jax.tree.map(place, ready.params, self.abstract.params)
            state = dataclasses.replace(state, params=placed)
        return state

    def _train_from(
        self, state: TrainState, checkpoints: CheckpointWriter
    ) -> tuple[TrainState, range]:
        first_step = int(state.step)
        train = self._config.train
        batches = train_batches(
            self._ready.mixture,
            self._config.data,
            global_batch=train.global_batch,
            first_sample=self._data_after(first_step).next_sample,
            num_batches=train.steps - first_step,
            rows=local_rows(self._ready.mesh, train.global_batch),
        )
        is_first = distributed.is_first()
        if is_first:
            with self._side.attempt(f"removing later samples from {rundir.SAMPLES}"):
                self._cut_samples(first_step)
        writer = MetricsWriter(
            self._folder() if is_first else Path(),
            first_step,
            train.steps,
            silent=not is_first,
            config=self._config,
            side=self._side,
        )
        with writer, contextlib.ExitStack() as stack:
            hooks = Hooks(
                put=functools.partial(
                    put_batch, mesh=self._ready.mesh, global_batch=train.global_batch
                ),
                save=lambda step, state: checkpoints.save(step, state, self._data_after(step)),
                finish_saving=checkpoints.wait,
                retry_is_due=checkpoints.retry_is_due,
                validate=self._validate,
                sample=functools.partial(self._sample_and_score, writer),
                agree=Agreement(first_step),
            )
            step_fn: TrainStep = self._step_fn
            if self._profile is not None and is_first:
                folder = self._folder() / rundir.PROFILE
                step_fn = stack.enter_context(
                    profiled(step_fn, self._profile, first_step, folder, self._side)
                )
            return train_loop(self._config, state, step_fn, batches, hooks, writer, self._walltime)

    def _data_after(self, step: int) -> DataState:
        start = self._ready.start
        samples = (step - (self._ready.resume_step or 0)) * self._config.train.global_batch
        return dataclasses.replace(start, next_sample=start.next_sample + samples)

    def _newest_good(self, checkpoints: CheckpointWriter) -> TrainState | None:
        """Returns the newest saved state from which the run can recover, or None.

        The function skips a checkpoint whose state has nan or inf. It also skips a checkpoint that
        was saved after a bad step, because a signal had arrived.
        """
        checkpoints.wait()
        steps: list[int] = distributed.from_first(
            "the checkpoints", lambda: checkpoint.whole_steps(self._folder())
        )
        for step in reversed(steps):
            state = checkpoints.restore(step, self.abstract)
            if int(state.bad_steps) == 0 and is_finite(state):
                return state
            del state
        return None

    def _validate(self, state: TrainState) -> Mapping[str, float]:
        values = self._validator(self._derive(state.params))
        # Drawing takes up to a second, and `tell_the_end` draws the last picture.
        if time.monotonic() - self._drawn_at > _DRAW_EVERY_SEC:
            self._plot()
        return values

    def _sample_and_score(self, writer: MetricsWriter, step: int, state: TrainState) -> None:
        params = self._derive(state.params)
        self._write_samples(step, params, state.key_data)
        values = self._ready.evaluator(params)
        if values:
            writer.evaluation(step, values)

    def _write_samples(self, step: int, params: Params, key_data: jax.Array) -> None:
        model, tokenizer = self._config.model, self._ready.tokenizer
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), step)
        seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max))
        request = Request(
            [prompt_ids(tokenizer, "")] * self._config.evaluate.samples,
            max_new_tokens=min(_SAMPLE_TOKENS, model.max_seq_len - 1),
            sampling=Sampling(seed=seed),
            end_ids=tokenizer.convention.end_ids,
        )
        texts = generate(model, params, request)
        if not distributed.is_first():
            return
        with self._side.attempt(f"writing {rundir.SAMPLES}"):
            records = [{"step": step, "text": tokenizer.decode(ids)} for ids in texts]
            file = AppendedFile(self._folder(), rundir.SAMPLES)
            with contextlib.closing(file):
                file.append("".join(json.dumps(record) + "\n" for record in records).encode())

    def _cut_samples(self, first_step: int) -> None:
        """Removes samples from `first_step` on, because the run will write them again."""
        path = self._folder() / rundir.SAMPLES
        if path.exists():
            records = strict_json.read_lines(path, lambda r: strict_json.get(r, "step", int))
            kept = [json.dumps(record) + "\n" for record in records if record["step"] < first_step]
            rundir.write_whole(path, "".join(kept))
