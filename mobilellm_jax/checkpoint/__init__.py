"""Checkpoints: the state that a run resumes from, and the model that other commands open.

`RUN/checkpoints/STEP/` holds

- `params/`: the float32 parameters, written by Orbax,
- `optimizer/`: optimizer state, step, PRNG key and counts of bad steps, written by Orbax,
- `tokenizer/`: the tokenizer's file,
- `manifest.json`, written last: format version, resolved config, step, data state (the data and the
  next sample), type and shape of every array, size and SHA-256 of every file.

So a step folder needs no other file of the run, and a copy of it can have any name. Evaluation and
export read only `params/` and `tokenizer/`. A step is complete if it has a manifest. A complete
step is good if its files match the manifest. `latest_step` and `restore_step` compare the files
before they are used.
"""

from mobilellm_jax.checkpoint.folders import latest_in, latest_step, steps, whole_steps
from mobilellm_jax.checkpoint.reading import (
    FORMAT_VERSION,
    MODEL_PARTS,
    CheckpointError,
    DataState,
    can_resume,
    is_step_folder,
    read_config,
    read_data_state,
    restore_model,
    restore_state,
    restore_step,
    step_folder,
)
from mobilellm_jax.checkpoint.saving import CheckpointWriter, SaveError, save_model
from mobilellm_jax.storage.sealing import DamagedError

__all__ = [
    "FORMAT_VERSION",
    "MODEL_PARTS",
    "CheckpointError",
    "CheckpointWriter",
    "DamagedError",
    "DataState",
    "SaveError",
    "can_resume",
    "is_step_folder",
    "latest_in",
    "latest_step",
    "read_config",
    "read_data_state",
    "restore_model",
    "restore_state",
    "restore_step",
    "save_model",
    "step_folder",
    "steps",
    "whole_steps",
]
