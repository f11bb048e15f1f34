"""LiteRT models are written and run here."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from mobilellm_jax.export.artifact import open_artifact
from mobilellm_jax.export.exporting import export
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.size import parameter_count
from tests.export.rooms import (
    assert_all_of_the_room_is_exact,
    assert_nothing_stays_of_the_sequence_before,
    read_and_append,
)

_REASON = "pip install 'mobilellm-jax[export]'"
for library in ("litert_torch", "ai_edge_quantizer"):
    pytest.importorskip(library, reason=_REASON)
schema = pytest.importorskip("ai_edge_litert.schema_py_generated", reason=_REASON)

# torch and the converter print warnings about future changes.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOM = 300  # more than two chunks, not a multiple of a chunk, and more than the short span
SHARED = {"num_repeats": 2, "sharing": "reverse", "num_kv_heads": 1, "head_dim": 24}


@pytest.fixture(scope="module")
def exact(make_model, tokenizer, tmp_path_factory):
    return exported(make_model, tokenizer, tmp_path_factory, "float32", **SHARED)


@pytest.fixture(scope="module")
def int8(make_model, tokenizer, tmp_path_factory):
    fields = {"num_blocks": 1, "num_repeats": 2, "activation": "gelu", "tie_embeddings": False}
    return exported(make_model, tokenizer, tmp_path_factory, "int8", **fields)


def exported(make_model, tokenizer, tmp_path_factory, precision, **fields):
    """Returns a model, two sequences, their logits, and the verified artefact."""
    config, params, tokens_BT, _ = make_model(scale=5.0, max_seq_len=ROOM, **fields)
    tokens_BT = np.concatenate([tokens_BT, tokens_BT[::-1]], axis=1)[:, :ROOM]
    logits_BTV = np.asarray(make_model.logits(config)(params, tokens_BT))
    folder = tmp_path_factory.mktemp("litert") / precision
    source = OpenedModel(config, params, tokenizer, "a test")
    made = export(source, folder, format_name="litert", precision=precision)
    assert made.layers == config.num_blocks
    return config, tokens_BT.tolist(), logits_BTV, open_artifact(folder)


def test_all_of_the_room_is_read_and_appended_exactly(exact) -> None:
    _, tokens, logits_BTV, artifact = exact
    assert len(tokens[0]) == ROOM
    assert_all_of_the_room_is_exact(artifact, tokens[0], logits_BTV[0])


def test_a_sequence_sees_nothing_of_the_one_before_nor_of_padding(exact) -> None:
    _, tokens, logits_BTV, artifact = exact
    assert_nothing_stays_of_the_sequence_before(
        artifact, tokens, logits_BTV, lengths=(270, 130, 5), appended=15
    )


def test_blocks_and_tied_embeddings_are_stored_once_for_all_signatures(exact) -> None:
    config, _, _, artifact = exact
    angles = 384 * config.head_dim  # cosines and sines of three chunks
    numbers = parameter_count(config) + angles
    assert 4 * numbers <= constants_bytes(artifact.file) <= 4 * numbers + 4000
    assert {file.name for file in artifact.folder.glob("model.*")} == {"model.tflite"}


def constants_bytes(file: Path) -> int:
    """Returns the content of a model's buffers, which lie inside the flatbuffer or behind it."""
    model = schema.Model.GetRootAs(file.read_bytes(), 0)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    return sum(buffer.DataLength() + buffer.Size() for buffer in buffers)


def test_quantized_steps_equal_the_quantized_chunk(int8) -> None:
    """The activations of a token are quantized separately from the tokens read with it."""
    config, tokens, logits_BTV, artifact = int8
    at_once_TV, steps_TV = read_and_append(artifact.load(), tokens[0])
    error = np.abs(at_once_TV - logits_BTV[0]).mean()
    assert 1e-4 < error < 0.05 * np.abs(logits_BTV[0]).max()
    # Sums in another order may change a rounding.
    assert np.abs(at_once_TV - steps_TV).mean() < 0.05 * error
    angles, norms = 384 * config.head_dim, (2 * config.num_blocks + 1) * config.embed_dim
    stored = parameter_count(config) - norms + 4 * (angles + norms)  # one byte per weight
    assert stored <= constants_bytes(artifact.file) <= stored + 4000


def test_damaged_and_foreign_models_are_refused(exact, tmp_path) -> None:
    *_, artifact = exact
    from mobilellm_jax.export.litert.runtime import LitertRuntime

    other = tmp_path / "model.tflite"
    other.write_bytes(b"no model" * 1000)
    with pytest.raises(ValueError, match="LiteRT cannot load .*model.tflite"):
        LitertRuntime(other, artifact.info)
    folder = shutil.copytree(artifact.folder, tmp_path / "cut")
    file = folder / artifact.file.name
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.tflite"):
        open_artifact(folder)
    for field, value in (("vocab_size", 321), ("head_dim", 16), ("num_repeats", 1)):
        model = dataclasses.replace(artifact.info.model, **{field: value})
        with pytest.raises(ValueError, match="other arguments or results in decode"):
            LitertRuntime(artifact.file, dataclasses.replace(artifact.info, model=model))
    longer = dataclasses.replace(artifact.info.model, max_seq_len=385)
    with pytest.raises(ValueError, match="sequences of 385 .* other arguments or results"):
        LitertRuntime(artifact.file, dataclasses.replace(artifact.info, model=longer))
