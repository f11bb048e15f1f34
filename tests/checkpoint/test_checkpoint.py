"""Tests what checkpoints store, restore, keep and refuse."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax import checkpoint
from mobilellm_jax.checkpoint import saving
from mobilellm_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.sharding import logical_rules, make_mesh
from mobilellm_jax.storage import sealing
from mobilellm_jax.train.optimizer import make_optimizer
from mobilellm_jax.train.state import TrainState, abstract_state

CONFIG = Config(
    model=ModelConfig(
        vocab_size=300,
        embed_dim=16,
        num_blocks=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_dim=24,
        max_seq_len=16,
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=16),
    optimizer=OptimizerConfig(warmup_steps=1),
    train=TrainConfig(steps=10, global_batch=8, keep_checkpoints=2, keep_every=4),
)
DATA = checkpoint.DataState(next_sample=40, fingerprint="ab12")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(["a thin model is a deep model, on a phone too " * 20], 300, file)


def abstract(config: Config) -> TrainState:
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return abstract_state(config, optimizer, mesh, logical_rules(config.model, mesh.shape))


def filled(config: Config, seed: int = 0) -> TrainState:
    """Returns a state of random numbers in its shardings; no initialisation is compiled."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = rng.normal(size=leaf.shape) * 1e3
        return jax.device_put(np.asarray(value).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, abstract(config))


def reseal(run: Path, step: int, **changes: Any) -> None:
    """Writes a valid manifest with other entries, and removes the entries that are None."""
    folder = checkpoint.step_folder(run, step)
    content = sealing.read_manifest(folder) | changes
    (folder / sealing.MANIFEST).unlink()
    sealing.seal(folder, {k: v for k, v in content.items() if v is not None and k != "files"})


def with_mesh(**axes: int) -> Config:
    return dataclasses.replace(CONFIG, mesh=MeshConfig(**axes))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_comes_back_bit_by_bit(name: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(name=name, warmup_steps=1))
    state = filled(config)
    with checkpoint.CheckpointWriter(tmp_path, config, tokenizer) as writer:
        writer.save(3, state, DATA)
    with checkpoint.CheckpointWriter(tmp_path, config, tokenizer) as reader:
        restored = reader.restore(3, abstract(config))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert (old.dtype, old.sharding) == (new.dtype, new.sharding)
        np.testing.assert_array_equal(old, new)


def test_another_mesh_restores_the_same_numbers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    written, read = with_mesh(fsdp=4, tensor=2, data=1), with_mesh(data=2, fsdp=2, tensor=2)
    state = filled(written)
    with checkpoint.CheckpointWriter(tmp_path, written, tokenizer) as writer:
        writer.save(1, state, DATA)
    with checkpoint.CheckpointWriter(tmp_path, read, tokenizer) as reader:
        restored = reader.restore(1, abstract(read))
    query = ("blocks", "attention", "query")
    old, new = state.params, restored.params
    for name in query:
        old, new = old[name], new[name]
    assert old.sharding != new.sharding
    jax.tree.map(np.testing.assert_array_equal, state, restored)


def test_model_opens_without_its_optimizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = filled(with_mesh(fsdp=8, data=1))
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        writer.save(7, state, DATA)
    for part in (tmp_path / "checkpoints" / "7" / "optimizer").rglob("*"):
        if part.is_file():
            part.write_bytes(b"damaged")
    model = checkpoint.restore_model(tmp_path, 7)
    assert (model.run_config, model.step) == (CONFIG, 7)
    jax.tree.map(np.testing.assert_array_equal, state.params, model.params)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(model.params))
    assert model.tokenizer.encode("a thin phone") == tokenizer.encode("a thin phone")


def test_data_state_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        writer.save(5, filled(CONFIG), DATA)
    assert checkpoint.read_data_state(tmp_path, 5) == DATA
    content = sealing.read_manifest(checkpoint.step_folder(tmp_path, 5))
    assert content["data"] == {"version": 1, "next_sample": 40, "fingerprint": "ab12"}
    assert content["config"] == dataclasses.asdict(CONFIG)


@pytest.mark.parametrize(
    ("written", "named"),
    [({"version": 7}, "a data state of version 7"), (None, "no data state")],
)
def test_other_data_state_is_refused_where_it_is_needed(
    written: Any, named: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Old releases wrote no data state. Only resuming needs the data state."""
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        writer.save(5, filled(CONFIG), DATA)
    reseal(tmp_path, 5, data=written)
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.read_data_state(tmp_path, 5)
    assert f"has {named}, and this program resumes version 1," in str(error.value)
    assert f"--config.train.init_from={tmp_path}/checkpoints/5" in str(error.value)
    assert checkpoint.restore_model(tmp_path, 5).step == 5


def test_newest_and_every_fourth_are_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = filled(CONFIG)
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        for step in range(1, 8):
            writer.save(step, state, DATA)
    assert checkpoint.steps(tmp_path) == [4, 6, 7]
    assert checkpoint.latest_step(tmp_path) == 7


def test_an_existing_step_stays(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = filled(CONFIG, seed=1), filled(CONFIG, seed=2)
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        writer.save(1, first, DATA)
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        writer.save(1, second, DATA)
    model = checkpoint.restore_model(tmp_path, 1)
    jax.tree.map(np.testing.assert_array_equal, first.params, model.params)


def test_an_error_that_no_disk_causes_counts_as_a_failed_save(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may raise any error. It leaves no save for which the end of the run would wait."""

    def wrong(*_: object) -> None:
        raise TypeError("a mistake in the code")

    monkeypatch.setattr(saving, "_start_writing", wrong)
    with (
        pytest.raises(checkpoint.SaveError, match="the last save .* failed"),
        checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer,
    ):
        writer.save(1, filled(CONFIG), DATA)
    assert checkpoint.steps(tmp_path) == []


def test_imported_model_cannot_be_resumed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    params = jax.tree.map(np.asarray, filled(CONFIG).params)
    checkpoint.save_model(tmp_path / "run", CONFIG, params, tokenizer)
    assert checkpoint.latest_step(tmp_path / "run") == 0
    assert not checkpoint.can_resume(tmp_path / "run", 0)
    model = checkpoint.restore_model(tmp_path / "run", 0)
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}


def test_an_unfinished_step_is_not_listed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        writer.save(1, filled(CONFIG), DATA)
    folder = tmp_path / "checkpoints"
    (folder / "2.saving-1").mkdir()
    (folder / "3").write_text("a file")
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.latest_step(tmp_path) == 1
    assert checkpoint.steps(tmp_path / "nowhere") == []
    assert checkpoint.latest_step(tmp_path / "nowhere") is None


def test_other_format_version_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with checkpoint.CheckpointWriter(tmp_path, CONFIG, tokenizer) as writer:
        writer.save(1, filled(CONFIG), DATA)
    reseal(tmp_path, 1, format_version=99)
    for use in (checkpoint.restore_model, checkpoint.read_data_state):
        with pytest.raises(checkpoint.CheckpointError, match=r"format_version=99.*reads 2"):
            use(tmp_path, 1)
    # The step is not skipped like a damaged step, because an older step would lose training.
    with pytest.raises(checkpoint.CheckpointError, match=r"format_version=99.*reads 2"):
        checkpoint.latest_step(tmp_path)
    with pytest.raises(checkpoint.DamagedError, match=r"is incomplete: it has no manifest.json"):
        checkpoint.read_config(tmp_path)
    before_manifests = tmp_path / "checkpoints" / "2" / "run"
    before_manifests.mkdir(parents=True)
    (before_manifests / "metadata").write_text('{"format_version": 1}')
    with pytest.raises(checkpoint.CheckpointError, match=r"format_version=1, .*reads 2"):
        checkpoint.latest_step(tmp_path)
