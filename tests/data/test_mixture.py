"""Tests the text that names mixtures, the exact proportions, and each component's coverage."""

import hashlib
import itertools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm_jax.config import ConfigError, DataConfig
from mobilellm_jax.data.loader import train_batches, validation_batches
from mobilellm_jax.data.mixture import Mixture, mixture_of, open_mixture, split_path
from tests.data.token_folders import windows_per_epoch


def documents(first_id: int, *lengths: int) -> list[list[int]]:
    """Writes documents of BOS, unique ids and EOS."""
    ids = itertools.count(first_id)
    return [[1, *itertools.islice(ids, n), 2] for n in lengths]


@pytest.fixture
def three(write_tokens: Any, tmp_path: Path) -> str:
    """Components of 9, 4 and 17 windows of 5 targets, with ids of their own."""
    for name, first_id, lengths in (
        ("a", 100, (20, 3, 17)),
        ("b", 200, (16,)),
        ("c", 300, (1, 1, 40, 33)),
    ):
        write_tokens(
            name=name,
            train=documents(first_id, *lengths),
            validation=documents(first_id + 500, *lengths[:2]),
            shard_tokens=25,
        )
    return f"{tmp_path}/a:0.5,{tmp_path}/b:0.2,{tmp_path}/c:0.3"


def component_of(row: Any) -> int:
    """Computes windows from the ids: 1 is BOS, 2 is EOS, 0 is padding."""
    return int(max(row)) % 500 // 100 - 1


def samples(mixture: Mixture, first: int, count: int, seq_len: int = 5) -> np.ndarray:
    data = DataConfig(seq_len=seq_len, seed=3)
    (batch,) = train_batches(mixture, data, global_batch=count, first_sample=first, num_batches=1)
    return np.concatenate([batch["tokens"], batch["targets"] * (batch["weights"] > 0)], axis=1)


def test_a_lone_folder_is_the_whole_mixture(write_tokens: Any, tmp_path: Path) -> None:
    folder = write_tokens(name="lone", train=documents(100, 90))
    mixture = open_mixture(str(tmp_path / "lone"))
    assert [(c.name, c.share) for c in mixture.components] == [("lone", Fraction(1))]
    assert mixture.fingerprint == folder.fingerprint
    sample_B = np.arange(1000)
    component_B, index_B = mixture.place(sample_B, seed=4)
    assert not component_B.any()
    np.testing.assert_array_equal(index_B, sample_B)


def test_every_block_has_exactly_the_proportions(three: str) -> None:
    mixture = open_mixture(three)
    assert mixture.block_counts.tolist() == [5, 2, 3]
    assert [c.name for c in mixture.components] == ["a", "b", "c"]
    orders = set()
    for block in range(50):
        component_B, index_B = mixture.place(np.arange(10 * block, 10 * block + 10), seed=0)
        assert Counter(component_B.tolist()) == {0: 5, 1: 2, 2: 3}
        for component, count in enumerate((5, 2, 3)):
            of_block = sorted(index_B[component_B == component].tolist())
            assert of_block == list(range(count * block, count * block + count))
        orders.add(tuple(component_B.tolist()))
    assert len(orders) > 40  # of 2,520


def test_weights_are_exact_and_normalised(three: str) -> None:
    shares = lambda text: [c.share for c in open_mixture(text).components]  # noqa: E731
    folders = [item.rpartition(":")[0] for item in three.split(",")]
    written = ",".join(f"{f}:{w}" for f, w in zip(folders, ("0.1", "0.2", "0.3"), strict=True))
    assert shares(written) == [Fraction(1, 6), Fraction(1, 3), Fraction(1, 2)]
    assert open_mixture(written).block_counts.tolist() == [1, 2, 3]
    written = ",".join(f"{f}:{w}" for f, w in zip(folders, ("2", "1e1", "3.0"), strict=True))
    assert shares(written) == [Fraction(2, 15), Fraction(2, 3), Fraction(1, 5)]


def test_sources_with_weights_are_components(write_tokens: Any, tmp_path: Path) -> None:
    weighted = write_tokens(
        name="weighted",
        train=[*documents(100, 9, 9), *documents(200, 30)],
        sources=[("text:a*", 0.3, {"train": 2}), ("text:b*", 0.1, {"train": 1})],
        shard_tokens=15,
    )
    mixture = mixture_of(weighted)
    assert [(c.name, c.share) for c in mixture.components] == [
        ("text:a*", Fraction(3, 4)),
        ("text:b*", Fraction(1, 4)),
    ]
    rows = samples(mixture, 0, 4 * 6)
    assert Counter(component_of(row) for row in rows) == {0: 18, 1: 6}
    write_tokens(name="plain", train=documents(300, 8))
    both = open_mixture(f"{tmp_path}/weighted:1,{tmp_path}/plain:3")
    assert [(c.name, c.share) for c in both.components] == [
        ("text:a*", Fraction(3, 16)),
        ("text:b*", Fraction(1, 16)),
        ("plain", Fraction(3, 4)),
    ]
    assert both.tokenizer == tmp_path / "weighted" / "tokenizer.model"


@pytest.mark.parametrize("boundaries", ["concat", "document_mask"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_each_component_covers_its_targets_once_per_epoch(
    three: str, epochs: int, boundaries: Any
) -> None:
    """Component c reaches the end of epoch E at its sample E * W, anywhere in the run."""
    mixture = open_mixture(three)
    data = DataConfig(seq_len=5, seed=1, boundaries=boundaries)
    windows = [
        windows_per_epoch(mixture.alone(component), "train", 5) for component in mixture.components
    ]
    assert windows == [9, 4, 17]
    sample_B = np.arange(400)
    component_B, index_B = mixture.place(sample_B, seed=1)
    (batch,) = train_batches(mixture, data, global_batch=400, first_sample=0, num_batches=1)
    for number, component in enumerate(mixture.components):
        rows = (component_B == number) & (index_B < epochs * windows[number])
        assert rows.sum() == epochs * windows[number]
        found = Counter(batch["targets"][rows][batch["weights"][rows] > 0].tolist())
        stream = component.stream("train")
        assert stream is not None
        tokens = stream.read(0, stream.tokens).tolist()
        starts = stream.document_starts(0, stream.tokens).tolist()
        no_targets = starts if boundaries == "document_mask" else [0]
        expected = Counter(token for at, token in enumerate(tokens) if at not in no_targets)
        assert found == Counter({token: epochs * n for token, n in expected.items()})


def test_components_have_orders_of_their_own(write_tokens: Any, tmp_path: Path) -> None:
    """Two equal folders are read in different orders, and neither order follows the blocks."""
    for name in "ab":
        write_tokens(name=name, train=documents(100, 200))
    mixture = open_mixture(f"{tmp_path}/a:1,{tmp_path}/b:1")
    component_B, _ = mixture.place(np.arange(40), seed=3)
    rows = samples(mixture, 0, 40)[:, 0]
    assert rows[component_B == 0].tolist() != rows[component_B == 1].tolist()


def test_validation_goes_through_the_components_in_order(three: str) -> None:
    mixture = open_mixture(three)
    data = DataConfig(seq_len=5)
    batches = list(validation_batches(mixture, data, batch=4))
    apart = [
        batch
        for component in mixture.components
        for batch in validation_batches(mixture.alone(component), data, batch=4)
    ]
    assert len(batches) == len(apart) > 3
    for one, other in zip(batches, apart, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    seen = [component_of(row) for b in batches for row in b["tokens"] if row.any()]
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2}
    targets = [t for b in batches for t in b["targets"][b["weights"] > 0].tolist()]
    expected = []
    for component in mixture.components:
        stream = component.stream("validation")
        assert stream is not None
        expected += stream.read(1, stream.tokens).tolist()
    assert targets == expected


def test_component_without_validation_is_passed_over(write_tokens: Any, tmp_path: Path) -> None:
    write_tokens(name="a", train=documents(100, 9))
    write_tokens(name="b", train=documents(200, 9), validation=documents(200, 4))
    mixture = open_mixture(f"{tmp_path}/a:1,{tmp_path}/b:1")
    (batch,) = validation_batches(mixture, DataConfig(seq_len=5), batch=1)
    assert batch["targets"].tolist() == [[200, 201, 202, 203, 2]]
    with pytest.raises(ValueError, match=r"split 'validation' has 0 tokens"):
        validation_batches(mixture.alone(mixture.components[0]), DataConfig(seq_len=5), batch=1)


def test_component_without_training_tokens_is_refused(write_tokens: Any, tmp_path: Path) -> None:
    write_tokens(name="a", train=documents(100, 9))
    write_tokens(name="b", validation=documents(200, 4))
    mixture = open_mixture(f"{tmp_path}/a:1,{tmp_path}/b:1")
    with pytest.raises(ValueError, match=r"split 'train' of b has 0 tokens"):
        train_batches(mixture, DataConfig(seq_len=5), global_batch=1, first_sample=0)


def test_other_tokenizers_are_refused(write_tokens: Any, tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"other")):
        path = write_tokens(name=name, train=documents(100, 9)).path
        (path / "tokenizer.model").write_bytes(content)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["tokenizer_sha256"] = hashlib.sha256(content).hexdigest()
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError) as error:
        open_mixture(f"{tmp_path}/a:1,{tmp_path}/b:1")
    for name, content in (("a", b"one"), ("b", b"other")):
        assert str(tmp_path / name / "tokenizer.model") in str(error.value)
        assert hashlib.sha256(content).hexdigest()[:12] in str(error.value)
    assert "--tokenizer" in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a:0.5,b", "'b' must be a folder and its weight"),
        ("a:0.5,b:x", "'b:x' must be"),
        ("a:0.5,b:0", "'b:0' must be"),
        ("a:0.5,b:-1", "'b:-1' must be"),
        ("a:0.5,b:nan", "'b:nan' must be"),
        ("a:0.5,b:inf", "'b:inf' must be"),
        ("a:0.5,b:1/3", "'b:1/3' must be"),
        ("a:0.5,:0.5", "':0.5' must be"),
        ("a:0.5,", "'' must be"),
        ("a:0.5,b:1,a:0.5", "names a 2 times"),
    ],
)
def test_bad_mixtures_are_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as error:
        split_path(text)
    assert named in str(error.value)
    assert f"data.path={text!r}" in str(error.value)


def test_an_existing_folder_is_a_folder_whatever_its_name(tmp_path: Path) -> None:
    for name in ("web:0.7", "a:0.5,b:0.5"):
        (tmp_path / name).mkdir()
        assert split_path(f"{tmp_path}/{name}") == [(tmp_path / name, 1)]
    # The last colon in a mixture separates the weight.
    assert split_path(f"{tmp_path}/web:0.7:3,x:1") == [(tmp_path / "web:0.7", 3), (Path("x"), 1)]
    assert split_path("none:0.7") == [(Path("none"), Fraction(7, 10))]
    assert split_path("no:such") == [(Path("no:such"), 1)]


def test_a_long_block_is_refused(three: str) -> None:
    folders = [item.rpartition(":")[0] for item in three.split(",")]
    with pytest.raises(ConfigError, match=r"1,000,003 samples.*at most 100,000; .*fewer digits"):
        open_mixture(f"{folders[0]}:1,{folders[1]}:1000002")
    assert open_mixture(f"{folders[0]}:1,{folders[1]}:99999").block_counts.sum() == 100_000


def test_names_are_as_short_as_tells_them_apart(write_tokens: Any, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write_tokens(name="one/web", train=documents(100, 9))
    write_tokens(name="two/web", train=documents(100, 9))
    sources = [("text:x", 1, {"train": 1}), ("text:x", 1, {"train": 1})]
    write_tokens(name="twice", train=documents(100, 9, 9), sources=sources)
    mixture = open_mixture(f"{tmp_path}/one/web:1,{tmp_path}/two/web:1,{tmp_path}/twice:1")
    assert [c.name for c in mixture.components] == [
        f"{tmp_path}/one/web",
        f"{tmp_path}/two/web",
        f"{tmp_path}/twice/text:x#3",
        f"{tmp_path}/twice/text:x#4",
    ]


def test_fingerprint_tells_data_and_shares(write_tokens: Any, tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_tokens(name=f"{folder}/a", train=documents(100, 9))
        write_tokens(name=f"{folder}/b", train=documents(200, 9))
    write_tokens(name="other", train=documents(200, 8))

    def fingerprint(text: str) -> str:
        return open_mixture(text.replace("@", str(tmp_path))).fingerprint

    same = fingerprint("@/here/a:0.5,@/here/b:0.5")
    assert fingerprint("@/there/a:2,@/there/b:2") == same
    others = ("@/here/b:1,@/here/a:1", "@/here/a:1,@/here/b:2", "@/here/a:1,@/other:1", "@/here/a")
    assert len({same, *map(fingerprint, others)}) == 5
