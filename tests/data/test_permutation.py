import numpy as np
import pytest

from mobilellm_jax.data.permutation import permuted


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_every_index_has_one_image(n: int) -> None:
    image_W = permuted(np.arange(n), n, seed=3, epoch=5)
    assert sorted(image_W.tolist()) == list(range(n))


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    all_at_once_W = permuted(np.arange(1000), 1000, seed=1, epoch=2)
    one_by_one = [int(permuted(np.array([i]), 1000, seed=1, epoch=2)[0]) for i in range(1000)]
    assert all_at_once_W.tolist() == one_by_one


def test_seed_and_epoch_give_orders_of_their_own() -> None:
    orders = {
        tuple(permuted(np.arange(100), 100, seed=seed, epoch=epoch).tolist())
        for seed in range(8)
        for epoch in range(8)
    }
    assert len(orders) == 64  # seed 0 in epoch 1 is not seed 1 in epoch 0


def test_epochs_may_differ_from_index_to_index() -> None:
    index_W, epoch_W = np.arange(60) % 30, np.arange(60) * 7
    one_by_one = [
        int(permuted(np.array([i]), 30, seed=2, epoch=int(e))[0])
        for i, e in zip(index_W, epoch_W, strict=True)
    ]
    assert permuted(index_W, 30, seed=2, epoch=epoch_W).tolist() == one_by_one


def test_streams_are_orders_of_their_own() -> None:
    orders = {
        tuple(permuted(np.arange(100), 100, seed=0, epoch=epoch, stream=stream).tolist())
        for epoch in range(6)
        for stream in range(-1, 5)
    }
    assert len(orders) == 36
    assert all(sorted(order) == list(range(100)) for order in orders)


def test_images_are_spread_evenly() -> None:
    """Over many keys, each of 5 indices takes each of 5 places about equally often."""
    keys = 1000
    counts_55 = np.zeros((5, 5))
    for epoch in range(keys):
        counts_55[np.arange(5), permuted(np.arange(5), 5, seed=0, epoch=epoch)] += 1
    # The standard deviation of each count is sqrt(1000 * 0.2 * 0.8) = 13. The test allows five.
    assert np.abs(counts_55 - keys / 5).max() < 65


def test_neighbours_are_torn_apart() -> None:
    image_W = permuted(np.arange(10_000), 10_000, seed=0, epoch=0)
    rank_correlation = np.corrcoef(np.arange(10_000), image_W)[0, 1]
    assert abs(rank_correlation) < 0.05  # five standard deviations of 1/sqrt(n)
    # In a random order, neighbouring images differ by one about twice, never 10 times.
    assert (np.abs(np.diff(image_W)) == 1).sum() < 12


def _splitmix64(value: int) -> int:
    """Computes the finaliser in Python's integers."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def _image(index: int, n: int, seed: int, epoch: int, stream: int = 0) -> int:
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = 2**half - 1
    key = _splitmix64(_splitmix64(seed) ^ epoch)
    if stream:
        key = _splitmix64(key ^ _splitmix64(stream % 2**64))
    while True:
        left, right = index >> half, index & low
        for round_number in range(8):
            round_key = _splitmix64((key + round_number) % 2**64)
            left, right = right, left ^ (_splitmix64(right ^ round_key) & low)
        index = (left << half) | right
        if index < n:
            return index


@pytest.mark.parametrize(
    ("n", "seed", "epoch", "stream"),
    [(5, 0, 0, 0), (97, 2**40 + 1, 3, 0), (2609, 0, 1, 0), (97, 3, 2, 4), (10, 3, 2, -1)],
)
def test_equals_the_same_network_in_plain_integers(
    n: int, seed: int, epoch: int, stream: int
) -> None:
    expected = [_image(i, n, seed, epoch, stream) for i in range(n)]
    assert permuted(np.arange(n), n, seed, epoch, stream).tolist() == expected


def test_the_order_never_changes() -> None:
    """Existing runs rely on these values: a change makes the data position of checkpoints wrong."""
    assert permuted(np.arange(10), 10, seed=0, epoch=0).tolist() == [
        _image(i, 10, 0, 0) for i in range(10)
    ]
    assert _splitmix64(0) == 0xE220A8397B1DCDAF  # published first output of SplitMix64 for seed 0
