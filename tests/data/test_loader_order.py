"""The order of batches is the same for any number of hosts, any stop and any start."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data.loader import train_batches
from mobilellm_jax.data.mixture import Mixture, open_mixture
from mobilellm_jax.data.permutation import permuted
from tests.data.token_folders import windows_per_epoch

BATCHES, GLOBAL_BATCH, SEQ_LEN = 1000, 8, 6
DATA = DataConfig(seq_len=SEQ_LEN, seed=5, boundaries="document_mask")


def documents(seed: int, count: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(3, 1000, rng.integers(0, 30)).tolist(), 2] for _ in range(count)]


@pytest.fixture(params=["folder", "mixture"])
def mixture(request: pytest.FixtureRequest, write_tokens: Any, tmp_path: Path) -> Mixture:
    """Folders of few windows: 8,000 samples are many epochs, and no batch size divides an epoch."""
    write_tokens(name="a", train=documents(0, 71), shard_tokens=300)
    other = documents(1, 11)
    masks = [[n % 3 > 0 for n in range(len(document))] for document in other]
    write_tokens(name="b", train=other, loss_masks={"train": masks})
    if request.param == "folder":
        return open_mixture(str(tmp_path / "a"))
    return open_mixture(f"{tmp_path}/a:0.7,{tmp_path}/b:0.3")


def hosts_rows(hosts: int) -> list[slice]:
    """Returns the rows of each of `hosts` processes, as `sharding.local_rows` divides them."""
    size = GLOBAL_BATCH // hosts
    return [slice(host * size, (host + 1) * size) for host in range(hosts)]


def digests(mixture: Mixture, first_batch: int, count: int, hosts: int = 1) -> list[str]:
    """Returns a checksum per global batch, joined from the rows that each host reads."""
    parts = [
        train_batches(
            mixture,
            DATA,
            global_batch=GLOBAL_BATCH,
            first_sample=first_batch * GLOBAL_BATCH,
            num_batches=count,
            rows=rows,
        )
        for rows in hosts_rows(hosts)
    ]
    return [_digest(of_hosts) for of_hosts in zip(*parts, strict=True)]


def _digest(of_hosts: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(of_hosts[0]):
        digest.update(name.encode())
        digest.update(np.concatenate([batch[name] for batch in of_hosts]).tobytes())
    return digest.hexdigest()


def runs(mixture: Mixture, stops: Sequence[int], hosts: Iterator[int]) -> list[str]:
    """Stops a run before these batches and continues with the next number of hosts."""
    borders = [0, *stops, BATCHES]
    return [
        digest
        for start, stop in itertools.pairwise(borders)
        for digest in digests(mixture, start, stop - start, next(hosts))
    ]


def test_a_thousand_batches_on_any_hosts_with_any_stops(mixture: Mixture) -> None:
    whole = digests(mixture, 0, BATCHES)
    assert len(set(whole)) == BATCHES
    for hosts in (2, 4):
        assert digests(mixture, 0, BATCHES, hosts) == whole, f"{hosts} hosts"
    windows = [
        windows_per_epoch(mixture.alone(component), "train", SEQ_LEN)
        for component in mixture.components
    ]
    assert all(w % GLOBAL_BATCH for w in windows), "epochs end within batches"
    # Test the first epoch, the end of that epoch, and a late epoch, each with another number of
    # hosts.
    wrap = windows[0] // GLOBAL_BATCH
    stops = [1, 2, wrap - 1, wrap, wrap + 1, wrap + 2, 3 * wrap + 5, 500, 501, 999]
    assert stops == sorted(set(stops))
    assert runs(mixture, stops, itertools.cycle((1, 2, 4))) == whole


def test_any_step_is_a_start(mixture: Mixture) -> None:
    whole = digests(mixture, 0, 130)
    for step in range(130):
        assert digests(mixture, step, 1, hosts=2) == [whole[step]], step


def test_a_lone_folder_keeps_its_order(write_tokens: Any) -> None:
    """Existing runs rely on this order: sample i is window permuted(i mod W) of epoch i // W."""
    dataset = write_tokens(train=[list(range(10, 10 + 89))])
    windows = windows_per_epoch(dataset, "train", 4)
    assert windows == 22
    data = DataConfig(seq_len=4, seed=9)
    (batch,) = train_batches(dataset, data, global_batch=70, first_sample=0, num_batches=1)
    expected = [
        permuted(np.array([i % windows]), windows, seed=9, epoch=i // windows)[0] for i in range(70)
    ]
    assert ((batch["tokens"][:, 0] - 10) // 4).tolist() == expected
