"""The shards do not depend on how the documents are divided into parts."""

import random
from pathlib import Path

import numpy as np
import pytest

from mobilellm_jax.data.preparation import assembly
from mobilellm_jax.data.preparation.parts import Part
from tests.data.token_folders import assemble_all, join_job, write_part


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
    made = assemble_all(join_job(tmp_path, "<u2", shard_tokens), output, "train", parts)
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

    def write_parts(work: Path) -> list[Part]:
        splits = [{"train": documents[5 * n : 5 * n + 5]} for n in range(4)]
        return [write_part(work / "parts", n, split) for n, split in enumerate(splits)]

    def assemble(work: Path, parts: list[Part], most: int) -> None:
        job = join_job(work, "<u2", 18)
        planner = assembly.Planner(job, "train")
        made = 0
        for part in parts:
            for plan in planner.add(part):
                if made == most:
                    return
                assembly.assemble(job, plan)
                made += 1
            planner.delete_used_parts()
        for plan in planner.end():
            assembly.assemble(job, plan)

    assemble(tmp_path / "whole", write_parts(tmp_path / "whole"), 100)
    whole = assembly.Planner(join_job(tmp_path / "whole", "<u2", 18), "train").made
    assert len(whole) == len(expected_shards(documents, 18)) == 6
    parts = write_parts(tmp_path / "again")
    assemble(tmp_path / "again", parts, stop_after)
    done = sum(expected.tokens for expected in whole[:stop_after])
    ends = np.cumsum([part.splits["train"].tokens for part in parts])
    left = sorted(file.name for file in (tmp_path / "again" / "parts").glob("*.tokens"))
    assert left[-1] == "00000003.train.tokens"
    assert len(left) >= sum(end > done for end in ends.tolist())
    assemble(tmp_path / "again", parts, 100)
    one, two = (
        {f.name: f.read_bytes() for f in (tmp_path / n / "shards").iterdir()}
        for n in ("whole", "again")
    )
    assert one == two
    kept = {f.name for f in (tmp_path / "again" / "parts").iterdir()}
    assert kept <= {"00000003.train.tokens", "00000003.train.offsets"}


def test_final_names_can_be_given_again(tmp_path: Path) -> None:
    part = write_part(tmp_path / "parts", 0, {"train": [[1, 2], [1, 5, 2]]})
    job, output = join_job(tmp_path, "<u2", 1), tmp_path / "output"
    output.mkdir()
    made = [assembly.assemble(job, plan) for plan in assembly.Planner(job, "train").add(part)]
    names = assembly.give_final_names(job, output, "train", made)
    before = {f.name: f.read_bytes() for f in output.iterdir()}
    assert sorted(before) == [
        f"train-0000{i}-of-00002.{suffix}" for i in (0, 1) for suffix in ("offsets", "tokens")
    ]
    (output / "train-00001-of-00002.tokens").rename(job.shards / "train-00001.tokens")
    assert assembly.give_final_names(job, output, "train", made) == names
    assert {f.name: f.read_bytes() for f in output.iterdir()} == before
