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
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from mobilellm_jax import announce, checkpoint, preflight
from mobilellm_jax.checkpoint import CheckpointWriter, DataState
from mobilellm_jax.config import Config
from mobilellm_jax.data.loader import train_batches
from mobilellm_jax.evaluate.in_training import make_validator
from mobilellm_jax.generation.generate import Request, generate
from mobilellm_jax.generation.sampling import Sampling
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.preflight import Ready
from mobilellm_jax.processes import distributed
from mobilellm_jax.processes.agreement import Agreement
from mobilellm_jax.processes.run_lock import RunLock
from mobilellm_jax.quantize.parameters import derivation, training_transform
from mobilellm_jax.sharding import local_rows, place, put_batch
from mobilellm_jax.startup.host_memory import keep_freed_memory
from mobilellm_jax.storage import rundir, strict_json
from mobilellm_jax.train.loop import Hooks, train_loop
from mobilellm_jax.train.metrics import MetricsWriter, plot_losses, read_metrics
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.profiler import ProfiledSteps, profiled
from mobilellm_jax.train.state import TrainState, abstract_state, init_state, is_finite
from mobilellm_jax.train.step import TrainStep, make_train_step
from mobilellm_jax.train.stopping import Walltime

_SAMPLE_TOKENS = 64


class TrainingDivergedError(RuntimeError):
    """Steps have nan or inf, and a return to the last good checkpoint did not help."""


def pretrain(
    config: Config,
    workdir: Path,
    profile: ProfiledSteps | None = None,
    walltime: Walltime | None = None,
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
            preflight.check_writable(workdir)
            if distributed.is_first():
                stack.enter_context(lock)
        ready = preflight.settle_run(config, workdir, profile)
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        run = _Run(ready, workdir, profile, walltime or Walltime())
        announce.start(ready.config, ready.mixture, ready.mesh, run.abstract, ready.resume_step)
        with CheckpointWriter(workdir, ready.config, ready.tokenizer, lock.check) as checkpoints:
            finished = run.train(checkpoints)
        run.plot()
        announce.end(workdir, finished)
        return finished


class _Run:
    def __init__(
        self,
        ready: Ready,
        workdir: Path,
        profile: ProfiledSteps | None,
        walltime: Walltime,
    ) -> None:
        self._ready, self._config = ready, ready.config
        self._workdir, self._profile, self._walltime = workdir, profile, walltime
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
                raise TrainingDivergedError(
                    announce.divergence(self._config, self._workdir, bad, back_at)
                )
            back_at = int(found.step)
            announce.going_back(bad, back_at)
            checkpoints.forget_after(back_at)
            state, bad = self._train_from(found, checkpoints)
        return int(state.step) >= self._config.train.steps

    def plot(self) -> None:
        if distributed.is_first():
            records = read_metrics(self._workdir / rundir.METRICS)
            plot_losses(records, self._workdir / rundir.LOSS_PLOT, self._workdir.name)

    def _first_state(self, checkpoints: CheckpointWriter) -> TrainState:
        ready = self._ready
        if ready.resume_step is not None:
            return checkpoints.restore(ready.resume_step, self.abstract)
        state = init_state(self._config, self._optimizer, ready.mesh, ready.rules, self.abstract)
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
            self._cut_samples(first_step)
        writer = MetricsWriter(self._workdir, first_step, train.steps, silent=not is_first)
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
                folder = self._workdir / rundir.PROFILE
                step_fn = stack.enter_context(profiled(step_fn, self._profile, first_step, folder))
            return train_loop(self._config, state, step_fn, batches, hooks, writer, self._walltime)

    def _data_after(self, step: int) -> DataState:
        start = self._ready.start
        samples = (step - (self._ready.resume_step or 0)) * self._config.train.global_batch
        return dataclasses.replace(start, next_sample=start.next_sample + samples)

    def _newest_good(self, checkpoints: CheckpointWriter) -> TrainState | None:
        """Returns the newest saved state from which the run can recover, or None.

        The function skips a checkpoint that a signal caused between bad steps, and a checkpoint
        whose state has nan or inf.
        """
        checkpoints.wait()
        steps: list[int] = distributed.from_first(
            "the checkpoints", lambda: checkpoint.whole_steps(self._workdir)
        )
        for step in reversed(steps):
            state = checkpoints.restore(step, self.abstract)
            if int(state.bad_steps) == 0 and is_finite(state):
                return state
            del state
        return None

    def _validate(self, state: TrainState) -> Mapping[str, float]:
        values = self._validator(self._derive(state.params))
        if 0 < int(state.step) < self._config.train.steps:  # `pretrain` draws the last picture.
            self.plot()
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
            [[tokenizer.bos_id]] * self._config.evaluate.samples,
            max_new_tokens=min(_SAMPLE_TOKENS, model.max_seq_len - 1),
            sampling=Sampling(seed=seed),
            eos_id=tokenizer.eos_id,
        )
        texts = generate(model, params, request)
        if not distributed.is_first():
            return
        with (self._workdir / rundir.SAMPLES).open("a", encoding="utf-8") as file:
            for ids in texts:
                file.write(json.dumps({"step": step, "text": tokenizer.decode(ids)}) + "\n")

    def _cut_samples(self, first_step: int) -> None:
        """Removes samples from `first_step` on, because the run will write them again."""
        path = self._workdir / rundir.SAMPLES
        if path.exists():
            records = strict_json.read_lines(path, lambda r: strict_json.get(r, "step", int))
            kept = [json.dumps(record) + "\n" for record in records if record["step"] < first_step]
            rundir.write_whole(path, "".join(kept))
