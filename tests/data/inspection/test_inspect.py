"""`inspect` against counts of the documents themselves, with raw SentencePiece and no NumPy."""

import dataclasses
import gzip
import hashlib
import json
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data.inspection.inspect import count_sources, inspect
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.shards import open_tokens
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer

HELD_OUT = 0.3


@dataclasses.dataclass(frozen=True)
class Prepared:
    folder: Path
    texts: list[dict[str, list[str]]]  # by source and split, as this file decides


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, trained: Tokenizer) -> Prepared:
    """Two weighted sources: files, and a compressed JSON-lines file with empty and bad lines."""
    folder = tmp_path_factory.mktemp("inspected")
    rng = random.Random(0)
    words = "the quick brown fox jumps sphinx of black quartz 日本 \n \t naïve 12".split(" ")
    files = [" ".join(rng.choices(words, k=rng.randrange(1, 80))) for _ in range(60)]
    rows = [" ".join(rng.choices(words[:6], k=rng.randrange(1, 20))) for _ in range(90)]
    for number, text in enumerate(files):
        (folder / f"{number:02d}.txt").write_bytes(text.encode())
    lines = [json.dumps({"text": text}) for text in [*rows[:40], "", *rows[40:], ""]]
    lines.insert(7, '{"text": 5}')
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    prepare(
        [f"text:{folder}/*.txt", f"jsonl:{folder}/rows.jsonl.gz"],
        folder / "tokens",
        weights=[0.75, 0.25],
        tokenizer=trained.file,
        validation_fraction=HELD_OUT,
        shard_tokens=700,
        on_bad_line="skip",
        workers=1,
    )
    return Prepared(folder / "tokens", [by_split(files), by_split(rows)])


def by_split(texts: list[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for text in texts:
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)
        splits["validation" if digest < HELD_OUT * 2**64 else "train"].append(text)
    return splits


def inspected(data: DataConfig, samples: int = 0) -> list[str]:
    lines: list[str] = []
    inspect(data, samples, lines.append)
    return lines


def test_the_table_is_that_of_an_independent_count(prepared: Prepared, trained: Tokenizer) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(trained.file))
    lines = inspected(DataConfig(path=str(prepared.folder)))
    assert len(open_tokens(prepared.folder).manifest.splits["train"].shards) > 2

    def row(name: str, texts: list[str]) -> list[str]:
        ids = [i for text in texts for i in raw.encode(text)]
        tokens, text_bytes = len(ids) + 2 * len(texts), sum(len(t.encode()) for t in texts)
        of_bytes = sum(raw.is_byte(i) for i in ids)
        rates = [f"{text_bytes / tokens:.2f}", "0.00%", f"{100 * of_bytes / tokens:.2f}%"]
        return [*name.split(), f"{len(texts):,}", f"{tokens:,}", f"{text_bytes:,}", *rates]

    for split in ("train", "validation"):
        texts = [source[split] for source in prepared.texts]
        assert all(texts)
        start = next(i for i, line in enumerate(lines) if line.startswith(split))
        rows = [line.split() for line in lines[start + 1 : start + 4]]
        assert rows == [
            row("source 1", texts[0]),
            row("source 2", texts[1]),
            row("together", texts[0] + texts[1]),
        ]
        ids = [i for text in texts[0] + texts[1] for i in raw.encode(text)]
        tokens = len(ids) + 2 * len(texts[0] + texts[1])
        rare = sum(raw.is_byte(i) and raw.id_to_piece(i) != "<0x0A>" for i in ids)
        assert f"byte tokens are {100 * rare / tokens:.2f}% of the tokens" in lines[start + 4]
        lengths = [len(raw.encode(text)) + 2 for text in texts[0] + texts[1]]
        assert lines[start + 6].split(": ")[1] == (
            f"median {statistics.median(lengths):g}, mean {statistics.mean(lengths):,.1f}, "
            f"longest {max(lengths)}"
        )
        bins = Counter(length.bit_length() for length in lengths)
        for offset, bits in enumerate(range(min(bins), max(bins) + 1)):
            low, _, high, count, *bar = lines[start + 7 + offset].split()
            assert [int(low), int(high), int(count)] == [2 ** (bits - 1), 2**bits - 1, bins[bits]]
            filled = len(bar[0]) if bar else 0
            assert abs(filled - 40 * bins[bits] / max(bins.values())) < 1
            assert bool(filled) == bool(bins[bits])


def test_sources_and_what_was_left_out(prepared: Prepared) -> None:
    lines = inspected(DataConfig(path=str(prepared.folder)))
    text = "\n".join(lines)
    assert "Tokenizer   tokenizer.model: SentencePiece, 400 ids" in lines
    assert f"Source 1    text:{prepared.folder.parent}/*.txt" in lines
    assert "weight 0.75, 0 empty documents and 0 bad lines left out\n" in text
    assert "weight 0.25, 2 empty documents and 1 bad lines left out (listed in manifest" in text
    at = lines.index("Of every 4 training samples")
    assert [line.split()[:3] for line in lines[at + 1 : at + 3]] == [
        ["3", "are", "from"],
        ["1", "are", "from"],
    ]
    # Ignore names as long as a test's folder.
    assert max(len(line) for line in lines if str(prepared.folder.parent) not in line) <= 100


def test_windows_are_as_asked(prepared: Prepared) -> None:
    def windows(**fields: object) -> list[str]:
        data = DataConfig(path=str(prepared.folder), seq_len=16, **fields)  # type: ignore[arg-type]
        lines = inspected(data, samples=6)
        return lines[next(i for i, line in enumerate(lines) if line.startswith("Window 1 of 6")) :]

    assert windows() == windows()
    assert windows(seed=1) != windows()
    assert any("⟦⟨BOS⟩⟧" in line for line in windows(boundaries="document_mask"))
    assert not any("⟦" in line for line in windows())
    assert sum(line.startswith("Window") for line in windows()) == 6


def test_a_mixture_of_folders(prepared: Prepared, trained: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("the lazy dog")
    prepare(
        [f"text:{tmp_path}/more.txt"],
        tmp_path / "more",
        tokenizer=trained.file,
        validation_fraction=0,
        workers=1,
    )
    lines = inspected(DataConfig(path=f"{prepared.folder}:0.8,{tmp_path / 'more'}:0.2"))
    assert sum("every checksum is right" in line for line in lines) == 2
    at = lines.index("Of every 5 training samples")
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["3", "1", "1"]


def test_unknown_tokens_and_four_bytes_per_id(tmp_path: Path) -> None:
    """Writes ids of a vocabulary that is too large for two bytes."""
    tokenizer = tmp_path / "tokenizer.json"
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 70_000)}}
    special = [{"id": i, "content": token, "special": True} for token, i in vocabulary.items()][:3]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    parts = dict.fromkeys(("normalizer", "post_processor", "decoder", "truncation", "padding"))
    content = {"version": "1.0", **parts, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    content |= {"added_tokens": [{**token, **flags} for token in special], "model": model}
    tokenizer.write_text(json.dumps(content))
    documents = [[5, 0, 69_999], [0, 0, 7, 7, 7]]
    (tmp_path / "ids.jsonl").write_text(
        "".join(json.dumps({"token_ids": ids}) + "\n" for ids in documents)
    )
    source = f"tokens:{tmp_path}/ids.jsonl"
    prepare([source], tmp_path / "data", tokenizer=tokenizer, validation_fraction=0, workers=1)
    lines = inspected(DataConfig(path=str(tmp_path / "data"), seq_len=11), samples=1)
    assert "Tokens      uint32" in lines
    assert "Tokenizer   tokenizer.json: Hugging Face WordLevel, 70,000 ids" in lines
    row = next(line.split() for line in lines if line.startswith("  source 1"))
    assert (row[2:4], row[6:]) == (["2", "12"], ["25.00%", "-"])
    assert "  ⟨BOS⟩w5 <unk> w69999⟨EOS⟩" in lines
    [counts] = count_sources(open_tokens(tmp_path / "data"))["train"]
    assert {i: n for i, n in enumerate(counts.of_id.tolist()) if n} == Counter(
        [0, 0, 0, 1, 1, 2, 2, 5, 7, 7, 7, 69_999]
    )


def test_a_byte_level_tokenizer_has_neither(byte_level: Tokenizer, tmp_path: Path) -> None:
    lines = inspected(one_letter_documents(byte_level, tmp_path))
    assert next(line.split() for line in lines if line.startswith("  source 1"))[6:] == ["-", "-"]
    assert not any("Without newlines" in line for line in lines)


def test_a_single_document_among_many_can_be_seen(trained: Tokenizer, tmp_path: Path) -> None:
    lines = inspected(one_letter_documents(trained, tmp_path))
    bars = {line.split()[3]: line.count("█") for line in lines if " to " in line and "█" in line}
    assert bars == {"100": 40, "1": 1}


def one_letter_documents(tokenizer: Tokenizer, folder: Path) -> DataConfig:
    """A hundred, and a longer one."""
    lines = [json.dumps({"text": text}) + "\n" for text in ["a"] * 100 + ["x" * 50]]
    (folder / "letters.jsonl").write_text("".join(lines))
    prepare(
        [f"jsonl:{folder}/letters.jsonl"],
        folder / "data",
        tokenizer=tokenizer.file,
        validation_fraction=0,
        workers=1,
    )
    return DataConfig(path=str(folder / "data"))


@pytest.mark.parametrize("suffix", ["tokens", "offsets"])
def test_the_damaged_file_is_named(suffix: str, prepared: Prepared, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in prepared.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damaged = sorted(folder.glob(f"train-00001-*.{suffix}"))[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    lines: list[str] = []
    with pytest.raises(ValueError, match=f"{damaged} has SHA-256"):
        inspect(DataConfig(path=str(folder)), 0, lines.append)
    assert lines == []
