import dataclasses
import shutil

import numpy as np
import pytest

pytest.importorskip("flatbuffers", reason="the export extra")

from mobilellm_jax.export.artifact import open_artifact
from mobilellm_jax.export.exporting import export
from mobilellm_jax.export.runtime import greedy
from mobilellm_jax.export.stablehlo.runtime import StableHloRuntime
from mobilellm_jax.model.opened import OpenedModel
from tests.export.conftest import random_params, tiny, tokenizer  # noqa: F401  # a fixture
from tests.export.examples import run_example

ROOM = 24
TOKENS = np.random.default_rng(1).integers(0, 320, ROOM).tolist()
SUMS = 1e-4  # float32 sums in another order, of logits of up to 10


@pytest.fixture(scope="module")
def artifact(tokenizer, tmp_path_factory):  # noqa: F811
    return exported(tokenizer, tmp_path_factory.mktemp("stablehlo") / "made", num_repeats=2)


def exported(tokenizer, folder, **fields):  # noqa: F811
    config = tiny(max_seq_len=ROOM, **fields)
    source = OpenedModel(config, random_params(config, 6.0), tokenizer, "random")
    export(source, folder, format_name="stablehlo", precision="float32", verified=False)
    return open_artifact(folder)


@pytest.fixture
def copied(artifact, tmp_path):
    """Returns the artefact, which a test may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(artifact.folder, folder)
    return dataclasses.replace(artifact, folder=folder)


def test_a_sequence_that_fills_the_cache(artifact):
    runtime = artifact.load()
    read_TV = runtime.read(TOKENS)
    rows = [runtime.read(TOKENS[:1])[-1], *(runtime.append(token) for token in TOKENS[1:])]
    np.testing.assert_allclose(np.stack(rows), read_TV, atol=SUMS)
    with pytest.raises(ValueError, match="25 tokens must have at least 1 and at most"):
        runtime.append(1)
    with pytest.raises(ValueError, match="25 tokens"):
        runtime.read([*TOKENS, 1])
    # the cache kept no token of the refused call
    np.testing.assert_array_equal(runtime.read(TOKENS), read_TV)


def test_a_length_between_two_programs(artifact):
    runtime = artifact.load()
    whole_TV = runtime.read(TOKENS[:20])
    assert runtime.read(TOKENS[:19]).shape == (19, 320)
    np.testing.assert_allclose(runtime.append(TOKENS[19]), whole_TV[19], atol=SUMS)


def test_the_cache_is_updated_in_place(artifact):
    runtime = artifact.load()

    def places():
        slots = [*runtime._cache["keys"], *runtime._cache["values"]]
        return [slot.unsafe_buffer_pointer() for slot in slots]

    runtime.read(TOKENS[:5])
    before = places()
    assert len(before) == 2 * 4
    runtime.append(7)
    assert places() == before


@pytest.mark.parametrize("file", ["model.stablehlo", "model.prefill.stablehlo"])
@pytest.mark.parametrize("spoil", ["half", "flip", "gone"])
def test_a_damaged_function_is_refused(file, spoil, copied):
    part = copied.folder / file
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.unlink()
    if spoil != "gone":
        part.write_bytes(data[: len(data) // 2] if spoil == "half" else data)
    with pytest.raises(ValueError, match=rf"{file} is not the function that model.safetensors"):
        StableHloRuntime(copied.file, copied.info)


@pytest.mark.parametrize("spoil", ["half", "foreign", "gone"])
def test_damaged_weights_are_refused(spoil, copied):
    part = copied.folder / "model.safetensors"
    data = part.read_bytes()
    part.unlink()
    if spoil != "gone":
        part.write_bytes(data[: len(data) // 2] if spoil == "half" else b"GGUF" * 10)
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        StableHloRuntime(copied.file, copied.info)


def test_files_of_two_exports_are_refused(copied, tokenizer, tmp_path):  # noqa: F811
    other = exported(tokenizer, tmp_path / "other", num_repeats=2, rope_theta=500.0)
    shutil.copy(other.file, copied.file)
    with pytest.raises(ValueError, match="is not the function that"):
        StableHloRuntime(copied.file, copied.info)


@pytest.mark.parametrize("field", ["vocab_size", "max_seq_len"])
def test_another_model_is_refused(field, copied):
    model = dataclasses.replace(copied.info.model, **{field: 25})
    with pytest.raises(ValueError, match="is not the model of"):
        StableHloRuntime(copied.file, dataclasses.replace(copied.info, model=model))


def test_the_documented_program_says_what_the_runtime_says(artifact):
    tokens = run_example("StableHLO", artifact.folder)
    assert len(set(tokens)) > 5
    assert tokens == list(greedy(artifact.load(), [1, 17, 42], 20))
