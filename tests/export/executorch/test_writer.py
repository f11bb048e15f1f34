"""ExecuTorch programs are written and run here. Lowering takes most of the time."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from mobilellm_jax.export.artifact import open_artifact
from mobilellm_jax.export.exporting import export
from mobilellm_jax.export.torch_decoder import TorchDecoder
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.size import parameter_count
from tests.export.rooms import (
    assert_all_of_the_room_is_exact,
    assert_nothing_stays_of_the_sequence_before,
    read_and_append,
)

_REASON = "pip install 'mobilellm-jax[export]'"
for library in ("executorch", "torchao"):
    pytest.importorskip(library, reason=_REASON)

# torch, torchao and executorch print warnings about each other.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOM = 200  # more than a chunk, and not a multiple of a chunk
SHARED = {"num_repeats": 2, "sharing": "reverse", "num_kv_heads": 1, "head_dim": 24}


@pytest.fixture(scope="module")
def exact(make_model, tokenizer, tmp_path_factory):
    return exported(make_model, tokenizer, tmp_path_factory, "float32", **SHARED)


@pytest.fixture(scope="module")
def int8(make_model, tokenizer, tmp_path_factory):
    fields = {"num_blocks": 1, "num_repeats": 2, "activation": "relu"}
    return exported(make_model, tokenizer, tmp_path_factory, "8da8w", **fields)


@pytest.fixture(scope="module")
def int4(make_model, tokenizer, tmp_path_factory):
    fields = {"num_blocks": 1, "num_repeats": 2}
    return exported(make_model, tokenizer, tmp_path_factory, "8da4w", **fields)


def exported(make_model, tokenizer, tmp_path_factory, precision, **fields):
    """Returns a model, two sequences, their logits, and the verified artefact."""
    config, params, tokens_BT, logits_BTV = make_model(scale=5.0, max_seq_len=ROOM, **fields)
    folder = tmp_path_factory.mktemp("executorch") / precision
    source = OpenedModel(config, params, tokenizer, "a test")
    made = export(source, folder, format_name="executorch", precision=precision)
    assert made.layers == config.num_blocks
    tokens, logits = tokens_BT[:, :ROOM].tolist(), logits_BTV[:, :ROOM]
    return config, tokens, logits, open_artifact(folder)


def test_all_of_the_room_is_read_and_appended_exactly(exact) -> None:
    _, tokens, logits_BTV, artifact = exact
    assert len(tokens[0]) == ROOM
    assert_all_of_the_room_is_exact(artifact, tokens[0], logits_BTV[0])


def test_a_sequence_sees_nothing_of_the_one_before(exact) -> None:
    _, tokens, logits_BTV, artifact = exact
    assert_nothing_stays_of_the_sequence_before(
        artifact, tokens, logits_BTV, lengths=(130, 5), appended=1
    )


def test_blocks_and_tied_embeddings_are_stored_once(exact) -> None:
    config, _, _, artifact = exact
    angles = ROOM * config.head_dim  # cosines and sines
    # The remaining bytes are the program: operators, names and padding.
    assert artifact.model_bytes <= 4 * (parameter_count(config) + angles) + 80_000
    assert {file.name for file in artifact.folder.glob("model.*")} == {"model.pte", "model.ptd"}


def test_activations_are_quantized_token_by_token(int8) -> None:
    """A token's logits do not depend on the tokens read with it, so steps equal chunks.

    Sums in another order may change a rounding, so a few numbers differ by one step of the
    quantization. If the scale covered all tokens, most numbers would differ.
    """
    config, tokens, logits_BTV, artifact = int8
    runtime = artifact.load()
    at_once_TV, steps_TV = read_and_append(runtime, tokens[0])
    error = np.abs(at_once_TV - logits_BTV[0]).mean()
    assert 1e-4 < error < 0.05 * np.abs(logits_BTV[0]).max()
    assert np.abs(at_once_TV - steps_TV).mean() < 0.05 * error
    alone_V = runtime.read(tokens[0][:1])[0]
    np.testing.assert_array_equal(alone_V, at_once_TV[0])
    # Each weight takes one byte and is stored once. Each row adds one number.
    assert artifact.model_bytes < 1.3 * parameter_count(config) + 120_000


def test_four_bits_are_stored_in_groups_and_the_table_in_eight(int4) -> None:
    _, tokens, logits_BTV, artifact = int4
    at_once_TV, steps_TV = read_and_append(artifact.load(), tokens[0])
    error = np.abs(at_once_TV - logits_BTV[0]).mean()
    assert 1e-3 < error < 0.15 * np.abs(logits_BTV[0]).max()
    assert np.abs(at_once_TV - steps_TV).mean() < 0.05 * error
    alone_V = artifact.load().read(tokens[0][:1])[0]
    np.testing.assert_array_equal(alone_V, at_once_TV[0])


def test_four_bits_are_sixteen_levels_in_each_group(make_model) -> None:
    from mobilellm_jax.export.executorch.writer import _quantize

    decoder = TorchDecoder(*make_model()[:2])
    _quantize(decoder, "8da4w")

    def levels(weight, size: int) -> int:
        return max(len(np.unique(part)) for part in weight.dequantize().reshape(-1, size).numpy())

    assert levels(decoder.blocks[0].up.weight, 32) <= 16
    assert levels(decoder.blocks[1].output.weight, 32) <= 16
    assert levels(decoder.head.weight, 32) > 16


def test_inputs_that_are_no_whole_groups_are_refused(make_model, tokenizer, tmp_path) -> None:
    config, params, *_ = make_model(ffn_dim=40)
    source = OpenedModel(config, params, tokenizer, "a test")
    with pytest.raises(ValueError, match=r"model\.ffn_dim=40 must be a multiple of 32"):
        export(source, tmp_path / "x", format_name="executorch", precision="8da4w", verified=False)
    assert not (tmp_path / "x").exists()


def test_damaged_and_foreign_programs_are_refused(exact, tmp_path) -> None:
    *_, artifact = exact
    from mobilellm_jax.export.executorch.runtime import ExecutorchRuntime

    for damage in (cut, garble, without_embeddings):
        folder = shutil.copytree(artifact.folder, tmp_path / damage.__name__)
        damage(folder)
        with pytest.raises(ValueError, match="ExecuTorch cannot load .*model.pte"):
            ExecutorchRuntime(folder / "model.pte", artifact.info)
    other = dataclasses.replace(artifact.info.model, vocab_size=321)
    with pytest.raises(ValueError, match="is not the model of 321 tokens"):
        ExecutorchRuntime(artifact.file, dataclasses.replace(artifact.info, model=other))


def test_sequences_too_short_are_refused(make_model, tokenizer, tmp_path) -> None:
    config, params, *_ = make_model(max_seq_len=3)
    source = OpenedModel(config, params, tokenizer, "a test")
    with pytest.raises(ValueError, match="model.max_seq_len=3 must be at least 4"):
        export(
            source, tmp_path / "x", format_name="executorch", precision="float32", verified=False
        )


def cut(folder: Path) -> None:
    file = folder / "model.pte"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(folder: Path) -> None:
    (folder / "model.pte").write_bytes(b"not a program" * 1000)


def without_embeddings(folder: Path) -> None:
    (folder / "model.ptd").unlink()
