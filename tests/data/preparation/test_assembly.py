"""The shards do not depend on how the documents are divided into parts."""

import random
from pathlib import Path

import numpy as np
import pytest

from mobilellm_jax.data.preparation import assembly
from mobilellm_jax.data.preparation.parts import part_file
from tests.data.token_folders import assemble_all, write_part


def expected_shards(documents: list[list[int]], shard_tokens: int) -> list[list[list[int]]]:
    """Computes the shards document by document from the definition."""
    shards: list[list[list[int]]] = []
    open_shard: list[list[int]] = []
    for document in documents:
        open_shard.append(document)
        if sum(len(d) for d in open_shard) >= shard_tokens:
            shards.append(open_shard)
            open_shard = []
    return [*shards, open_shard] if open_shard else shards


@pytest.mark.parametrize("seed", range(20))
def test_random_parts_make_the_expected_shards(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    documents = [[rng.randrange(900) for _ in range(rng.randrange(2, 12))] for _ in range(60)]
    masks = [[rng.randrange(2) for _ in d] for d in documents]
    shard_tokens = rng.choice([1, 7, 30, 100, 10_000])
    parts, at = [], 0
    masked = []
    while at < len(documents):
        stop = min(at + rng.choice([0, 0, 1, 2, 10, 40]), len(documents))
        has_mask = rng.random() < 0.5
        masked += [masks[i] if has_mask else [1] * len(documents[i]) for i in range(at, stop)]
        loss_masks = {"train": masks[at:stop]} if has_mask else None
        parts.append(
            write_part(
                tmp_path / "parts", len(parts), {"train": documents[at:stop]}, "<u2", loss_masks
            )
        )
        at = stop
    output = tmp_path / "output"
    output.mkdir()
    made = assemble_all(tmp_path / "parts", output, "train", parts, "<u2", shard_tokens)
    expected = expected_shards(documents, shard_tokens)
    assert [shard.documents for shard in made] == [len(shard) for shard in expected]
    mask_of = iter(masked)
    for shard, docs in zip(made, expected, strict=True):
        tokens = np.fromfile(output / f"{shard.name}.tokens", "<u2").tolist()
        starts = np.fromfile(output / f"{shard.name}.offsets", "<u8").tolist()
        stops = [*starts[1:], len(tokens)]
        assert [tokens[a:b] for a, b in zip(starts, stops, strict=True)] == docs
        expected_mask = [m for _ in docs for m in next(mask_of)]
        if (file := output / f"{shard.name}.loss_mask").is_file():
            assert np.fromfile(file, np.uint8).tolist() == expected_mask
        else:
            assert all(expected_mask)


@pytest.mark.parametrize("stop_after", range(6))
def test_an_interrupted_assembly_goes_on(tmp_path: Path, stop_after: int) -> None:
    """Assembly works when the parts before the first needed part have been deleted."""
    documents = [[part, i] * (1 + i) for part in range(4) for i in range(5)]
    parts = [
        write_part(tmp_path / "parts", n, {"train": documents[5 * n : 5 * n + 5]}) for n in range(4)
    ]

    def assemble(folder: Path, most: int) -> None:
        folder.mkdir(exist_ok=True)
        found, start = assembly.read_assembled(folder, "train")
        planner = assembly.Planner(tmp_path / "parts", "train", 18, len(found), start)
        made = 0
        for part in parts:
            for plan in planner.add(part):
                if made == most:
                    return
                assembly.assemble(tmp_path / "parts", folder, plan, np.dtype("<u2"))
                made += 1
        for plan in planner.end():
            assembly.assemble(tmp_path / "parts", folder, plan, np.dtype("<u2"))

    assemble(tmp_path / "whole", 100)
    whole, _ = assembly.read_assembled(tmp_path / "whole", "train")
    assert len(whole) == len(expected_shards(documents, 18)) == 6
    assemble(tmp_path / "again", stop_after)
    _, (needed, _) = assembly.read_assembled(tmp_path / "again", "train")
    for number in range(needed):
        for suffix in ("tokens", "offsets"):
            part_file(tmp_path / "parts", number, "train", suffix).unlink()
    assemble(tmp_path / "again", 100)
    one, two = (
        {f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("whole", "again")
    )
    assert one == two


def test_final_names_can_be_given_again(tmp_path: Path) -> None:
    part = write_part(tmp_path / "parts", 0, {"train": [[1, 2], [1, 5, 2]]})
    planner = assembly.Planner(tmp_path / "parts", "train", 1, 0, (0, 0))
    shards, output = tmp_path / "shards", tmp_path / "output"
    shards.mkdir()
    output.mkdir()
    made = [
        assembly.assemble(tmp_path / "parts", shards, plan, np.dtype("<u2"))
        for plan in planner.add(part)
    ]
    names = assembly.give_final_names(shards, output, "train", made)
    before = {f.name: f.read_bytes() for f in output.iterdir()}
    assert sorted(before) == [
        f"train-0000{i}-of-00002.{suffix}" for i in (0, 1) for suffix in ("offsets", "tokens")
    ]
    (output / "train-00001-of-00002.tokens").rename(shards / "train-00001.tokens")
    assert assembly.give_final_names(shards, output, "train", made) == names
    assert {f.name: f.read_bytes() for f in output.iterdir()} == before
