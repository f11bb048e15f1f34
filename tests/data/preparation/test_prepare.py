import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from mobilellm_jax.data import shards
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.sources import python_docs
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.data.verification import verify_files

HOSTILE = "  <s> a\u2581b \x00 \t\n\n 👩‍👩‍👧 </s>  "


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty small files and a nasty one."""
    rng = random.Random(0)
    words = "river stone light water cloud mountain under over between slowly".split()
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(40):
        text = " ".join(rng.choices(words, k=rng.randrange(1, 60)))
        (folder / f"{index:02d}.txt").write_text(f"{text}, {index}\n")
    (folder / "nasty.txt").write_bytes(HOSTILE.encode())
    return folder


@pytest.fixture
def given(corpus: Path, tmp_path: Path) -> Tokenizer:
    """`prepare` accepts a user's tokenizer file of any name."""
    texts = [file.read_text() for file in sorted(corpus.glob("[0-3]*.txt"))]
    return train_tokenizer(texts, 290, tmp_path / "mine.model")


def texts_in(folder: Path, split: str) -> list[str]:
    """Reads the documents of a split with only NumPy and raw SentencePiece."""
    raw = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    found = []
    for tokens in sorted(folder.glob(f"{split}-*.tokens")):
        ids = np.fromfile(tokens, "<u2")
        starts = np.fromfile(tokens.with_suffix(".offsets"), "<u8").tolist()
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            document = ids[start:stop].tolist()
            assert (document[0], document[-1]) == (1, 2)
            assert not {1, 2} & set(document[1:-1])
            found.append(raw.decode(document[1:-1]))
    return found


def test_every_document_comes_back_from_the_disk(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    manifest = prepare(
        [f"text:{corpus}/*.txt"],
        output,
        vocab_size=320,
        validation_fraction=0.2,
        shard_tokens=500,
    )
    files = [file.read_bytes().decode() for file in sorted(corpus.glob("*.txt"))]
    train, validation = texts_in(output, "train"), texts_in(output, "validation")
    assert sorted(train + validation) == sorted(files)
    assert train == [text for text in files if text in train]  # in order
    assert 2 <= len(validation) <= 16  # the expected number is 8, the standard deviation 2.6
    assert len(manifest.splits["train"].shards) > 2
    for name, texts in (("train", train), ("validation", validation)):
        split = manifest.splits[name]
        assert split.documents == len(texts)
        assert split.text_bytes == sum(len(text.encode()) for text in texts)
        stored = sum(np.fromfile(f, "<u2").size for f in output.glob(f"{name}-*.tokens"))
        assert split.tokens == stored
    assert manifest.sources == (
        shards.SourceRecord(
            spec=f"text:{corpus}/*.txt",
            weight=None,
            splits={
                name: shards.Counts(
                    documents=split.documents, tokens=split.tokens, text_bytes=split.text_bytes
                )
                for name, split in manifest.splits.items()
            },
            empty_documents=0,
            bad_lines=(),
        ),
    )
    dataset = shards.open_tokens(output)
    verify_files(dataset)
    assert dataset.manifest == shards.read_manifest(output)
    assert load_tokenizer(dataset.tokenizer).vocab_size == manifest.vocab_size == 320


def test_equal_input_gives_equal_files(corpus: Path, tmp_path: Path) -> None:
    sources = [f"text:{corpus}/*.txt", f"text:{corpus}/0*.txt"]
    for name in ("one", "two"):
        prepare(sources, tmp_path / name, vocab_size=320, shard_tokens=700)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert len(one) > 6


def test_sources_follow_one_another(corpus: Path, tmp_path: Path) -> None:
    sources = [f"text:{corpus}/3*.txt", f"text:{corpus}/nasty.txt", f"text:{corpus}/0*.txt"]
    prepare(sources, tmp_path / "data", vocab_size=300, validation_fraction=0)
    expected = [*(f"{i}.txt" for i in range(30, 40)), "nasty.txt"]
    expected += [f"0{i}.txt" for i in range(10)]
    assert texts_in(tmp_path / "data", "train") == [
        (corpus / name).read_bytes().decode() for name in expected
    ]
    assert "validation" not in shards.read_manifest(tmp_path / "data").splits


def test_python_docs_keep_their_own_split(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = [(f"module/{i}", f"docs of module number {i} are here\n") for i in range(60)]
    monkeypatch.setattr(python_docs, "documents", lambda stdlib: iter(docs))
    sources = ["python_docs", f"text:{corpus}/00.txt"]
    manifest = prepare(sources, tmp_path / "data", vocab_size=295)
    held_out = {text for name, text in docs if python_docs.split_of(name) == "validation"}
    assert 0 < len(held_out) < 60
    assert set(texts_in(tmp_path / "data", "validation")) == held_out
    # `prepare` holds out no part of a single file if there is validation text already.
    assert {n: c.documents for n, c in manifest.sources[1].splits.items()} == {"train": 1}
    sources = ["python_docs", f"text:{corpus}/0*.txt"]
    half = prepare(sources, tmp_path / "half", vocab_size=295, validation_fraction=0.5)
    for split, counts in manifest.sources[0].splits.items():  # of another tokenizer
        assert half.sources[0].splits[split].documents == counts.documents
        assert half.sources[0].splits[split].text_bytes == counts.text_bytes
    assert 0 < half.sources[1].splits["validation"].documents < 10


def test_a_given_tokenizer_is_used_and_copied(
    corpus: Path, tmp_path: Path, given: Tokenizer
) -> None:
    manifest = prepare([f"text:{corpus}/*.txt"], tmp_path / "data", tokenizer=given.file)
    copy = tmp_path / "data" / "tokenizer.model"
    assert copy.read_bytes() == given.file.read_bytes()
    assert (manifest.tokenizer, manifest.tokenizer_sha256) == ("tokenizer.model", given.sha256)
    assert HOSTILE in texts_in(tmp_path / "data", "train") + texts_in(
        tmp_path / "data", "validation"
    )


@pytest.mark.parametrize(("fraction", "counts"), [(1e-9, (4, 1)), (0.999999, (1, 4))])
def test_both_splits_get_a_document_where_there_are_two(
    corpus: Path, tmp_path: Path, given: Tokenizer, fraction: float, counts: tuple[int, int]
) -> None:
    output = tmp_path / "data"
    source = f"text:{corpus}/0[0-4].txt"
    prepare([source], output, tokenizer=given.file, validation_fraction=fraction)
    assert (len(texts_in(output, "train")), len(texts_in(output, "validation"))) == counts


def test_a_single_document_is_divided_unless_it_consists_of_tokens(
    corpus: Path, tmp_path: Path, given: Tokenizer
) -> None:
    spec, output = f"text:{corpus}/00.txt", tmp_path / "data"
    prepare([spec], output, tokenizer=given.file, validation_fraction=0)
    assert texts_in(output, "train") == [(corpus / "00.txt").read_text()]
    prepare([spec], tmp_path / "divided", tokenizer=given.file)
    train, validation = (texts_in(tmp_path / "divided", s) for s in ("train", "validation"))
    assert [train[0] + validation[0]] == texts_in(output, "train")
    (tmp_path / "ids.jsonl").write_text('{"token_ids": [5, 6, 7]}')
    with pytest.raises(ValueError, match="cannot be held out of a single document"):
        prepare([f"tokens:{tmp_path}/ids.jsonl"], tmp_path / "ids", tokenizer=given.file)


def test_prepared_again_it_is_left_alone(
    corpus: Path, tmp_path: Path, log_lines: list[str]
) -> None:
    output = tmp_path / "data"

    def again(**changes: Any) -> list[str]:
        log_lines.clear()
        settings = {"sources": [f"text:{corpus}/*.txt"], "vocab_size": 300} | changes
        prepare(settings.pop("sources"), output, **settings)
        return list(log_lines)

    again()
    before = {file: file.stat().st_mtime_ns for file in output.iterdir()}
    assert again() == [f"{output} is complete already, made with the same settings; nothing to do."]
    with pytest.raises(ValueError, match=r"tokenizer: there 'trained, 300 tokens', asked for"):
        again(vocab_size=310)
    with pytest.raises(ValueError, match="validation_fraction: there 0.01, asked for 0.5"):
        again(validation_fraction=0.5)
    with pytest.raises(ValueError, match="made with other settings .sources: there"):
        again(sources=[f"text:{corpus}/0*.txt"])
    assert {file: file.stat().st_mtime_ns for file in output.iterdir()} == before
    (corpus / "00.txt").write_text("changed")
    with pytest.raises(ValueError, match="made with other settings .sources: there"):
        again()


def test_a_folder_with_other_things_is_not_touched(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"precious' exists, but is not a folder of token shards"):
        prepare([f"text:{corpus}/*.txt"], output, vocab_size=300)
    assert [f.name for f in output.iterdir()] == ["thesis.txt"]
    (output / "thesis.txt").unlink()
    assert prepare([f"text:{corpus}/*.txt"], output, vocab_size=300).vocab_size == 300


def test_after_an_error_there_is_nothing(corpus: Path, tmp_path: Path, given: Tokenizer) -> None:
    (corpus / "zz.txt").write_bytes(b"fine until \xff")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"zz\.txt, line 1, byte 11: .*--on_bad_line=skip"):
        prepare(
            [f"text:{corpus}/*.txt"],
            tmp_path / "data",
            tokenizer=given.file,
            validation_fraction=0,
            shard_tokens=50,
        )
    assert sorted(tmp_path.iterdir()) == before


def test_a_document_that_the_tokenizer_cannot_hold_is_named(corpus: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f.read_text() for f in sorted(corpus.glob("[0-3]*.txt"))]),
        model_prefix=str(closed.with_suffix("")),
        vocab_size=45,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"nasty\.txt: .*has no token for .* and no byte fallback"):
        prepare([f"text:{corpus}/*.txt"], tmp_path / "data", tokenizer=closed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "tokenizer=None and vocab_size=None: give exactly one"),
        ({"vocab_size": 300, "tokenizer": Path("x")}, "tokenizer='x' and vocab_size=300"),
        ({"vocab_size": 300, "validation_fraction": 1.0}, "validation_fraction=1.0 must be"),
        ({"vocab_size": 300, "validation_fraction": -0.1}, "validation_fraction=-0.1 must be"),
        ({"vocab_size": 300, "sources": []}, "source is empty"),
    ],
)
def test_bad_settings(corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings = {"sources": [f"text:{corpus}/*.txt"]} | changes
    with pytest.raises(ValueError, match=message):
        prepare(settings.pop("sources"), tmp_path / "data", **settings)
    assert not (tmp_path / "data").exists()


def test_a_corpus_without_text(corpus: Path, tmp_path: Path, given: Tokenizer) -> None:
    (corpus / "empty.md").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\*\.md: no document with text"):
        prepare([f"text:{corpus}/*.md"], tmp_path / "data", tokenizer=given.file)
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        prepare([f"text:{corpus}/*.md"], tmp_path / "data", vocab_size=300)
