import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm_jax.data.preparation.parts import Job, Part, PieceEncoder, Task, read_part
from mobilellm_jax.data.shards import Counts, token_dtype
from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer

TEXT = "the river ran under the mountain and the cloud over it, slowly"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return train_tokenizer([TEXT] * 20, 290, tmp_path / "tokenizer.model")


def encode(tmp_path: Path, tokenizer: Tokenizer, spec: str, **changes: Any) -> Part:
    parts = tmp_path / "parts"
    parts.mkdir(exist_ok=True)
    settings = {"held_out": 0, "skip_bad_lines": False} | changes
    job = Job(
        sources=(spec,),
        work=tmp_path,
        tokenizer=tokenizer.file,
        dtype=token_dtype(tokenizer.vocab_size),
        skip_bad_lines=settings["skip_bad_lines"],
        shard_tokens=1,
    )
    (piece,) = open_source(spec, tmp_path / "scratch").pieces("train")
    heard: list[Counts] = []
    part = PieceEncoder(job).encode(Task(0, 0, settings["held_out"], piece), heard.append)
    assert sum(heard, Counts()) == sum(part.splits.values(), Counts())
    assert read_part(parts, 0) == part
    assert read_part(parts, 1) is None
    return part


def array(tmp_path: Path, suffix: str, dtype: str, split: str = "train") -> list[int]:
    return np.fromfile(tmp_path / "parts" / f"00000000.{split}.{suffix}", dtype).tolist()


def write_lines(file: Path, *rows: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_tokens_get_the_bos_and_eos_that_they_lack(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    rows = [ids, [1, *ids], [*ids, 2], [1, *ids, 2], [1], [], [1, 2, 1, *ids, 2]]
    file = write_lines(tmp_path / "ids.jsonl", *({"token_ids": row} for row in rows))
    part = encode(tmp_path, tokenizer, f"tokens:{file}")
    expected = [*[[1, *ids, 2]] * 4, [1, 2], [1, 2], [1, 2, 1, *ids, 2]]
    assert array(tmp_path, "tokens", "<u2") == [i for row in expected for i in row]
    lengths = [len(row) for row in expected]
    assert array(tmp_path, "offsets", "<u8") == np.cumsum([0, *lengths[:-1]]).tolist()
    assert part.splits["train"].text_bytes == 5 * len(TEXT)
    assert [*part.splits["train"].shards[0].files] == ["tokens", "offsets"]
    assert not (tmp_path / "parts" / "00000000.train.loss_mask").exists()


def test_a_loss_mask_goes_along(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """EOS is a target if the last token is one. Every token of an unmasked document is a target."""
    rows = [
        {"token_ids": [7, 8, 9]},
        {"token_ids": [7, 8, 9], "loss_mask": [0, 1, 1]},
        {"token_ids": [1, 7, 8, 2], "loss_mask": [1, 0, 1, 0]},
        {"token_ids": [5, 6], "loss_mask": [1, 0]},
    ]
    file = write_lines(tmp_path / "ids.jsonl", *rows)
    part = encode(tmp_path, tokenizer, f"tokens:{file}")
    assert "loss_mask" in part.splits["train"].shards[0].files
    assert part.splits["validation"].shards == ()
    expected = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]]
    assert array(tmp_path, "loss_mask", "u1") == [i for row in expected for i in row]


def test_a_mask_that_begins_in_a_later_batch(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilellm_jax.data.preparation.parts._BATCH_DOCUMENTS", 1)
    rows = [{"token_ids": [7]}, {"token_ids": [8], "loss_mask": [0]}, {"token_ids": [9]}]
    encode(tmp_path, tokenizer, f"tokens:{write_lines(tmp_path / 'ids.jsonl', *rows)}")
    assert array(tmp_path, "loss_mask", "u1") == [1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_ids_of_another_vocabulary_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_lines(tmp_path / "ids.jsonl", {"token_ids": [5]}, {"token_ids": [5, 290]})
    with pytest.raises(
        ValueError, match=r"ids\.jsonl, byte 19: token id 290 must be less than .* 290"
    ):
        encode(tmp_path, tokenizer, f"tokens:{file}")
    part = encode(tmp_path, tokenizer, f"tokens:{file}", skip_bad_lines=True)
    assert part.splits["train"].documents == 1
    assert "ids.jsonl, byte 19" in part.bad_lines[0]["document"]
    assert "token id 290" in part.bad_lines[0]["reason"]


def test_empty_documents_are_counted_and_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["", TEXT, "", "", " ", "x"]
    file = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    part = encode(tmp_path, tokenizer, f"jsonl:{file}")
    assert part.empty_documents == 3
    assert part.splits["train"].documents == 3
    assert part.splits["train"].text_bytes == len(TEXT) + 2


def test_held_out_documents_keep_their_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"{TEXT} {i}" for i in range(50)]
    file = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    part = encode(tmp_path, tokenizer, f"jsonl:{file}", held_out=1 << 63)
    found = {}
    for split in ("train", "validation"):
        tokens, starts = (
            array(tmp_path, suffix, dtype, split)
            for suffix, dtype in (("tokens", "<u2"), ("offsets", "<u8"))
        )
        stops = [*starts[1:], len(tokens)]
        found[split] = [tokenizer.decode(tokens[a:b]) for a, b in zip(starts, stops, strict=True)]
        assert found[split] == sorted(found[split], key=texts.index)
        assert part.splits[split].documents == len(found[split]) > 10
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
