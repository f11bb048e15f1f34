"""Reads the state of a run from its files, and tells whether two runs are comparable.

`sweep`, `report` and `train` all use this file, so that they agree. If a run cannot be read, the
error names the run.

Two runs are comparable if they differ only in their seeds and in settings without an effect on the
numbers, if they read the same data, and if their learning rate followed the same schedule from
the first step on. A run that was continued with a larger `train.steps` has had another schedule
before, unless the schedule does not depend on the number of steps.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mobilellm_jax import checkpoint
from mobilellm_jax import config as config_lib
from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import rundir
from mobilellm_jax.train.metrics import read_metrics
from mobilellm_jax.train.optimizer import learning_rate

# A resumed run may change these settings: its length, its intervals, and how it computes the same
# numbers. Other changes are errors, because they would make the earlier records of the run wrong.
MAY_CHANGE = frozenset(
    {
        *("train.steps", "train.log_every", "train.eval_every", "train.eval_batches"),
        *("train.checkpoint_every", "train.keep_checkpoints", "train.keep_every"),
        *("train.max_bad_steps", "train.accumulation_steps", "train.loss_chunk"),
        *("train.spike_factor", "train.deterministic"),
        *("evaluate.every", "evaluate.samples", "model.attention", "model.remat"),
        *("evaluate.tasks", "evaluate.limit", "evaluate.data_dir", "evaluate.text"),
        "model.scan_unroll",
        *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence", "mesh.dcn_data"),
        # `data_state` checks that the tokens are the same.
        *("data.path", "data.source", "data.verify"),
    }
)
# Fields in which comparable runs may differ. The other fields of MAY_CHANGE change the result of a
# run, or the text on which its validation loss is measured.
NO_RESULT = (
    MAY_CHANGE - {"train.steps", "data.path", "train.spike_factor", "train.eval_batches"}
) | {"train.seed", "data.seed"}

State = Literal["waiting", "started", "finished", "failed", "longer", "diverged", "imported"]
_SAME_RATE = 1e-4  # The recorded rates are float32 numbers, which other versions round differently.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The contents of the files in a run folder; `read_record` reads them."""

    folder: Path
    config: Config | None  # None if the folder has no config.json, as before the first start.
    records: list[dict[str, Any]]
    outcome: dict[str, Any]

    def values(self, name: str) -> dict[int, float]:
        """Returns the values of a metric by step."""
        return {int(r["step"]): float(r[name]) for r in self.records if name in r}

    @property
    def last_step(self) -> int:
        """The last step with a recorded loss, or 0."""
        return max([*self.values("train/loss"), *self.values("validation/loss")], default=0)

    @property
    def reason(self) -> str:
        """The recorded reason of a failure."""
        return str(self.outcome.get("reason", "unknown"))

    def state(self, steps: int) -> State:
        """Returns the state of the run for a command that wants a run of `steps` steps.

        A run that has taken more steps is `longer`. Its learning rate followed a longer schedule,
        so its loss at `steps` differs from the loss of a run that ends there. A run that diverged
        has reached the last step without a finite validation loss. `sweep` records the outcome of a
        run. Without this record, a run is finished if it has a validation loss at its last step.
        """
        outcome = self.outcome.get("state")
        if outcome == "failed":
            return "failed"
        if self.config is None:
            return "waiting"
        if self.last_step > steps:
            return "longer"
        loss = self.values("validation/loss").get(steps)
        ended = outcome == "finished" and self.outcome.get("steps") == steps
        if self.config.train.steps == steps and (loss is not None or ended):
            if outcome not in (None, "finished"):
                return "started"
            return "finished" if loss is not None and math.isfinite(loss) else "diverged"
        return "imported" if self._is_imported else "started"

    def other_schedule_until(self, config: Config) -> int:
        """Returns the last step whose learning rate is not the rate of a run with `config`, or 0.

        The schedule counts only steps that made an update, so this method subtracts the steps that
        `train/skipped_steps` counts.
        """
        skipped, rates, updates, steps = 0, [], [], []
        for record in self.records:
            if "train/learning_rate" in record:
                rates.append(record["train/learning_rate"])
                steps.append(record["step"])
                updates.append(record["step"] - 1 - skipped)
            skipped = int(record.get("train/skipped_steps", skipped))
        if not steps:
            return 0
        expected = np.asarray(
            learning_rate(config.optimizer, config.train.steps)(np.array(updates))
        )
        off = np.abs(np.array(rates) - expected) > _SAME_RATE * config.optimizer.peak_lr
        return int(np.array(steps)[off].max(initial=0))

    @functools.cached_property
    def data(self) -> str | None:
        """The fingerprint of the data in the newest checkpoint; None if no checkpoint has one."""
        saved = checkpoint.steps(self.folder)
        try:
            return checkpoint.read_data_state(self.folder, saved[-1]).fingerprint if saved else None
        except UserError:  # An imported model, or a checkpoint of another version.
            return None

    @property
    def _is_imported(self) -> bool:
        """Whether the folder holds a model that this program did not train."""
        saved = [] if self.records else checkpoint.steps(self.folder)
        try:
            return bool(saved) and not checkpoint.can_resume(self.folder, saved[-1])
        except UserError:  # A damaged checkpoint, or a checkpoint of another version.
            return False


def read_record(folder: Path) -> RunRecord:
    """Reads the files of a run folder, which may be missing.

    Raises:
      UserError: if a file is damaged, or if another version of this program wrote it; the message
        names the file.
    """
    config = folder / rundir.CONFIG
    try:
        return RunRecord(
            folder=folder,
            config=config_lib.read_json(config) if config.exists() else None,
            records=read_metrics(folder / rundir.METRICS),
            outcome=rundir.read_outcome(folder),
        )
    except config_lib.ConfigError as error:
        text = str(error)
        raise UserError(text if str(config) in text else f"{config}: {text}") from error
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{error.filename or folder}: {error.strerror}.") from error
