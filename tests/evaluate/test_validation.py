"""Validation during training equals losses that are added up token by token."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from mobilellm_jax.data.mixture import Component, Mixture, open_mixture
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.evaluate.in_training import make_validator
from mobilellm_jax.model.transformer import Params, Transformer, init_params
from mobilellm_jax.sharding import logical_rules, make_mesh
from tests import tiny

SEQ_LEN = 16
CONFIG = Config(
    model=dataclasses.replace(
        tiny.MODEL,
        max_seq_len=SEQ_LEN,
        init_std=0.5,  # so that losses differ from token to token
        compute_dtype="float32",
    ),
    data=DataConfig(seq_len=SEQ_LEN),
    optimizer=OptimizerConfig(warmup_steps=0),
    train=TrainConfig(steps=1, global_batch=16, accumulation_steps=2),
)
# A jitted program sums float32 losses in another order.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns token folders: `plain` and `other` of text; `masked`, where a mask hides half."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["thin", "deep", "block", "shared", "twice", "phone", "small", "model"]
    for name, count in (("plain", 12), ("other", 5)):
        (folder / f"{name}.text").mkdir()
        for i in range(count):
            text = " ".join(rng.choice(words, rng.integers(3, 60))) + f" {i}"
            (folder / f"{name}.text" / f"{i}.txt").write_text(text)
    prepare([f"text:{folder}/plain.text/*"], folder / "plain", vocab_size=300,
            validation_fraction=0.5)  # fmt: skip
    with (folder / "masked.jsonl").open("w") as file:
        for _ in range(9):
            ids = rng.integers(10, 290, rng.integers(1, 40)).tolist()
            mask = rng.integers(0, 2, len(ids)).tolist()
            file.write(json.dumps({"token_ids": ids, "loss_mask": mask}) + "\n")
    for name, source in (("other", "text:other.text/*"), ("masked", "tokens:masked.jsonl")):
        kind, _, pattern = source.partition(":")
        tokenizer = folder / "plain" / "tokenizer.model"
        prepare([f"{kind}:{folder}/{pattern}"], folder / name, tokenizer=tokenizer,
                validation_fraction=0.5)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(CONFIG.model, jax.random.key(0))


def validate(config: Config, mixture: Mixture, params: Params) -> dict[str, float]:
    mesh = make_mesh(config.mesh)
    rules = logical_rules(config.model, mesh.shape)
    return make_validator(config, mixture, mesh, rules)(params)


def losses_of(params: Params, component: Component, boundaries: str) -> list[list[float]]:
    """Returns the losses of a component's targets for each window, from plain logits.

    With `document_mask`, the part of each document in a window becomes a separate row.
    """
    stream = component.stream("validation")
    assert stream is not None
    tokens = stream.read(0, stream.tokens).tolist()
    mask = stream.loss_mask(0, stream.tokens)
    counts = [True] * len(tokens) if mask is None else (mask != 0).tolist()
    starts = set(stream.document_starts(0, stream.tokens).tolist())
    windows = []
    for first in range(0, len(tokens) - 1, SEQ_LEN):
        last = min(first + SEQ_LEN, len(tokens) - 1)
        if boundaries == "document_mask":
            cuts = [first, *sorted(s for s in starts if first < s <= last), last + 1]
        else:
            cuts = [first, last + 1]
        rows = [tokens[a:b] for a, b in itertools.pairwise(cuts)]
        padded = np.array([(row + [0] * SEQ_LEN)[: SEQ_LEN + 1] for row in rows], np.int32)
        logits = _logits(params, jnp.asarray(np.pad(padded, ((0, SEQ_LEN - len(rows)), (0, 0)))))
        found = []
        for number, (row, at) in enumerate(zip(rows, cuts, strict=False)):
            for i in range(1, len(row)):
                if counts[at + i]:
                    scores = logits[number, i - 1]
                    found.append(float(np.log(np.exp(scores).sum()) - scores[row[i]]))
        windows.append(found)
    return windows


@jax.jit
def _forward(params: Params, tokens_BT: jax.Array) -> jax.Array:
    logits_BTV: jax.Array = Transformer(CONFIG.model).apply({"params": params}, tokens_BT)
    return logits_BTV


def _logits(params: Params, tokens_BT: jax.Array) -> np.ndarray:
    return np.asarray(_forward(params, tokens_BT), np.float64)


def flat(windows: list[list[float]]) -> list[float]:
    return [loss for window in windows for loss in window]


@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
def test_loss_and_bits_of_a_folder(boundaries: Any, folder: Path, params: Params) -> None:
    config = dataclasses.replace(CONFIG, data=DataConfig(seq_len=SEQ_LEN, boundaries=boundaries))
    mixture = open_mixture(str(folder / "plain"))
    losses = flat(losses_of(params, mixture.components[0], boundaries))
    text = mixture.components[0].counts("validation").text_bytes
    assert validate(config, mixture, params) == {
        "validation/loss": pytest.approx(np.mean(losses), rel=CLOSE),
        "validation/bpb": pytest.approx(sum(losses) / math.log(2) / text, rel=CLOSE),
    }


@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
def test_the_loss_of_a_mixture_is_the_loss_over_all_held_out_data(
    boundaries: Any, folder: Path, params: Params
) -> None:
    config = dataclasses.replace(CONFIG, data=DataConfig(seq_len=SEQ_LEN, boundaries=boundaries))
    # The weights 9 and 1 apply to training; validation reads all data once.
    mixture = open_mixture(f"{folder}/plain:9,{folder}/other:1")
    plain, other = (flat(losses_of(params, c, boundaries)) for c in mixture.components)
    assert abs(np.mean(plain) - np.mean(other)) > 1e-3
    text = sum(c.counts("validation").text_bytes for c in mixture.components)
    assert validate(config, mixture, params) == {
        "validation/loss": pytest.approx(np.mean([*plain, *other]), rel=CLOSE),
        "validation/loss/plain": pytest.approx(np.mean(plain), rel=CLOSE),
        "validation/loss/other": pytest.approx(np.mean(other), rel=CLOSE),
        "validation/bpb": pytest.approx(sum([*plain, *other]) / math.log(2) / text, rel=CLOSE),
    }


@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
def test_masked_targets_do_not_count_and_remove_bits_per_byte(
    boundaries: Any, folder: Path, params: Params
) -> None:
    config = dataclasses.replace(CONFIG, data=DataConfig(seq_len=SEQ_LEN, boundaries=boundaries))
    mixture = open_mixture(f"{folder}/plain:1,{folder}/masked:1")
    plain, masked = (flat(losses_of(params, c, boundaries)) for c in mixture.components)
    assert 20 < len(masked) < 0.7 * mixture.components[1].counts("validation").tokens
    assert validate(config, mixture, params) == {
        "validation/loss": pytest.approx(np.mean([*plain, *masked]), rel=CLOSE),
        "validation/loss/plain": pytest.approx(np.mean(plain), rel=CLOSE),
        "validation/loss/masked": pytest.approx(np.mean(masked), rel=CLOSE),
    }
    alone = validate(config, open_mixture(str(folder / "masked")), params)
    assert alone == {"validation/loss": pytest.approx(np.mean(masked), rel=CLOSE)}


def test_a_short_evaluation_weighs_components_by_their_size(folder: Path, params: Params) -> None:
    """Each component gives one batch of 8 windows; their loss estimates the loss over all data."""
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, eval_batches=1))
    mixture = open_mixture(f"{folder}/plain:1,{folder}/other:1")
    windows = [losses_of(params, c, "concat") for c in mixture.components]
    assert min(map(len, windows)) > 8 and len(windows[0]) > 2 * len(windows[1])
    means = [np.mean(flat(w[:8])) for w in windows]
    sizes = [len(flat(w)) for w in windows]
    loss = np.average(means, weights=sizes)
    text = sum(c.counts("validation").text_bytes for c in mixture.components)
    assert validate(config, mixture, params) == {
        "validation/loss": pytest.approx(loss, rel=CLOSE),
        "validation/loss/plain": pytest.approx(means[0], rel=CLOSE),
        "validation/loss/other": pytest.approx(means[1], rel=CLOSE),
        "validation/bpb": pytest.approx(loss / math.log(2) * sum(sizes) / text, rel=CLOSE),
    }
