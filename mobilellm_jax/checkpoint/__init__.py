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
with the manifest before they use a step.
"""

from mobilellm_jax.checkpoint.folders import latest_in as latest_in
from mobilellm_jax.checkpoint.folders import latest_step as latest_step
from mobilellm_jax.checkpoint.folders import steps as steps
from mobilellm_jax.checkpoint.folders import whole_steps as whole_steps
from mobilellm_jax.checkpoint.reading import FORMAT_VERSION as FORMAT_VERSION
from mobilellm_jax.checkpoint.reading import MODEL_PARTS as MODEL_PARTS
from mobilellm_jax.checkpoint.reading import CheckpointError as CheckpointError
from mobilellm_jax.checkpoint.reading import DataState as DataState
from mobilellm_jax.checkpoint.reading import can_resume as can_resume
from mobilellm_jax.checkpoint.reading import is_step_folder as is_step_folder
from mobilellm_jax.checkpoint.reading import read_config as read_config
from mobilellm_jax.checkpoint.reading import read_data_state as read_data_state
from mobilellm_jax.checkpoint.reading import restore_model as restore_model
from mobilellm_jax.checkpoint.reading import restore_state as restore_state
from mobilellm_jax.checkpoint.reading import restore_step as restore_step
from mobilellm_jax.checkpoint.reading import step_folder as step_folder
from mobilellm_jax.checkpoint.saving import CheckpointWriter as CheckpointWriter
from mobilellm_jax.checkpoint.saving import SaveError as SaveError
from mobilellm_jax.checkpoint.saving import save_model as save_model
from mobilellm_jax.checkpoint.saving import write_config as write_config
from mobilellm_jax.storage.sealing import DamagedError as DamagedError
