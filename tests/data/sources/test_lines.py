import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard

from mobilellm_jax.data.sources import files
from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import BadLine, BadLineError, Document, TokenDocument
from tests.data.reading import read, texts

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def lines_of(values: list[Any], *, ascii_only: bool = True) -> bytes:
    return b"".join(json.dumps(v, ensure_ascii=ascii_only).encode() + b"\n" for v in values)


def bad_lines(spec: str) -> tuple[list[Any], list[BadLine]]:
    """Tests of the lines that are read, and of the lines that are left out."""
    bad: list[BadLine] = []
    return [d[1] for d in read(open_source(spec, Path()), on_bad=bad.append)], bad


def test_text_files_are_documents_in_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    contents = {
        "a.txt": BYTE_ORDER_MARK + b"a",
        "b.txt": b"b\r\n \xc3\xa9\x00\n\n",
        "deep/c.txt": b"c",
        "empty.txt": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(b"p\n") + gzip.compress(b"q"))
    (tmp_path / "packed.txt.zst").write_bytes(zstandard.compress(b"z"))
    source = open_source(f"text:{tmp_path}/**/*.txt*", tmp_path)
    assert source.splits() == ("train",)
    assert read(source) == [
        Document(str(tmp_path / "a.txt"), "\ufeffa"),
        Document(str(tmp_path / "b.txt"), "b\r\n é\x00\n\n"),
        Document(str(tmp_path / "deep/c.txt"), "c"),
        Document(str(tmp_path / "empty.txt"), ""),
        Document(str(tmp_path / "packed.txt.gz"), "p\nq"),
        Document(str(tmp_path / "packed.txt.zst"), "z"),
    ]


def test_small_files_share_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 10)
    for name, size in (("a", 4), ("b", 5), ("c", 25), ("d", 1)):
        (tmp_path / name).write_bytes(b"x" * size)
    source = open_source(f"text:{tmp_path}/*", tmp_path)
    assert [piece.size_bytes for piece in source.pieces("train")] == [9, 25, 1]
    assert [len(text) for text in texts(source)] == [4, 5, 25, 1]


def test_a_text_that_is_not_utf8_is_left_out_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\ncafé noir\n".encode("latin-1"))
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"\xff"))
    spec = f"text:{tmp_path}/*"
    with pytest.raises(BadLineError, match=r"a\.txt, line 2, byte 7: byte 0xe9 is not UTF-8"):
        read(open_source(spec, tmp_path))
    kept, bad = bad_lines(spec)
    assert kept == ["two"]
    assert [(b.file, b.line, b.byte_offset) for b in bad] == [
        (f"{tmp_path}/a.txt", 2, 7),
        (f"{tmp_path}/c.txt.gz", 1, 0),
    ]


def random_line(rng: random.Random) -> bytes:
    text = "".join(rng.choice('ab \té\u2028\x85\\"\n😀') for _ in range(rng.choice([0, 1, 9, 99])))
    line = json.dumps({"x": [1, {}], "text": text}, ensure_ascii=rng.random() < 0.5).encode()
    if rng.random() < 0.3:
        line = b" " + line.replace(b"{", b"{ \t") + b"\r"
    return line


def random_corpus(rng: random.Random) -> tuple[bytes, list[str], list[tuple[int, int]]]:
    """File content, the texts in it, and (line, offset) of the lines that are not JSON."""
    content, found, wrong = rng.choice([b"", BYTE_ORDER_MARK]), [], []
    for number in range(1, rng.randrange(14) + 1):
        kind = rng.random()
        if kind < 0.15:
            line = rng.choice([b"", b" \t", b"\r"])
        elif kind < 0.3:
            line = b"x"
            wrong.append((number, len(content)))
        else:
            line = random_line(rng)
            found.append(json.loads(line)["text"])
        content += line + b"\n"
    return content[: rng.choice([None, -1])] if content.endswith(b"\n") else content, found, wrong


@pytest.mark.parametrize("compress", [None, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("seed", range(40))
def test_pieces_together_have_every_document_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    compress: Callable[[bytes], bytes] | None,
) -> None:
    rng = random.Random(seed)
    limit = rng.choice([1, 3, 20, 150, 10_000])
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", limit)
    monkeypatch.setattr(files, "_BUFFER_BYTES", rng.choice([2, 16, 1000]))
    suffix = {None: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[compress]
    expected, expected_bad, stored = [], [], 0
    for name in ("a", "b", "c"):
        content, found, wrong = random_corpus(rng)
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(compress(content) if compress else content)
        stored += path.stat().st_size
        expected += found
        expected_bad += [(str(path), line, offset) for line, offset in wrong]
    spec = f"jsonl:{tmp_path}/*"
    kept, bad = bad_lines(spec)
    assert kept == expected
    assert [(b.file, b.line, b.byte_offset) for b in bad] == expected_bad
    pieces = open_source(spec, tmp_path).pieces("train")
    assert sum(piece.size_bytes for piece in pieces) == stored
    if not compress:
        assert all(piece.size_bytes <= limit for piece in pieces)


def test_a_byte_order_mark_is_dropped_at_the_start_only(tmp_path: Path) -> None:
    line = b'{"text": "one"}\n'
    (tmp_path / "a").write_bytes(BYTE_ORDER_MARK + line + BYTE_ORDER_MARK + line)
    kept, bad = bad_lines(f"jsonl:{tmp_path}/a")
    assert kept == ["one"]
    assert [(b.line, b.byte_offset) for b in bad] == [(2, 3 + len(line))]
    (tmp_path / "b").write_bytes(BYTE_ORDER_MARK + b"\n" + line)
    assert bad_lines(f"jsonl:{tmp_path}/b") == (["one"], [])


FAULTS = {
    b'{"text": "a"': (12, "is not JSON (Expecting ',' delimiter at character 13)"),
    '{"é": "a" "b"}'.encode(): (11, "is not JSON (Expecting ',' delimiter at character 11)"),
    b'{"text": "a"} {}': (14, "is not JSON (Extra data at character 15)"),
    b'{"text": "\xe9"}': (10, "byte 0xe9 is not UTF-8 (invalid continuation byte); convert"),
    # Python's json module alone would accept a surrogate written as UTF-8.
    b'{"text": "\xed\xa0\x80"}': (10, "byte 0xed is not UTF-8"),
    b'{"text": "a\\ud800b"}': (0, "character 2 of the text is a lone surrogate (U+D800)"),
    b'{"text": 1%s}' % (b"0" * 5000): (0, "is not JSON that can be read (Exceeds the limit"),
    b"[" * 200_000: (0, "is not JSON that can be read (maximum recursion depth"),
    b'["text"]': (0, "is an array, not an object"),
    b"3.5": (0, "is a number, not an object"),
    b'{"txt": "a", "b": 1}': (0, "has no field 'text', only txt, b Did you mean"),
    b"{}": (0, "has no field 'text', only none at all; name another with #FIELD"),
    b'{"text": null}': (0, "field 'text' is null, not a string"),
    b'{"text": ["a"]}': (0, "field 'text' is an array, not a string"),
    b'{"text": true}': (0, "field 'text' is a boolean, not a string"),
}


@pytest.mark.parametrize("line", FAULTS, ids=lambda line: line[:30].decode("latin-1"))
def test_what_is_wrong_with_a_line(tmp_path: Path, line: bytes) -> None:
    at, reason = FAULTS[line]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}')
    kept, (bad,) = bad_lines(f"jsonl:{path}")
    assert kept == ["one", "two"]
    assert (bad.file, bad.line, bad.byte_offset) == (str(path), 2, 16 + at)
    assert bad.reason.startswith(reason)
    with pytest.raises(BadLineError) as error:
        read(open_source(f"jsonl:{path}", tmp_path))
    assert str(error.value).startswith(f"{path}, line 2, byte {16 + at}: {reason}")
    assert str(error.value).endswith("with --on_bad_line=skip, which counts them.")


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"text": "\\ud83d\\ude00"}')
    assert texts(open_source(f"jsonl:{tmp_path}/a", tmp_path)) == ["😀"]


def test_the_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a#b.jsonl"
    path.write_bytes(lines_of([{"text": "t", "content": "c", "": "e"}]))
    assert texts(open_source(f"jsonl:{path}#content", tmp_path)) == ["c"]
    assert texts(open_source(f"jsonl:{path}#text", tmp_path)) == ["t"]
    with pytest.raises(FileNotFoundError, match="matches nothing"):
        texts(open_source(f"jsonl:{path}", tmp_path))  # its field would be b.jsonl
    fields = [open_source(f"jsonl:{path}#{f}", tmp_path).identity() for f in ("text", "content")]
    assert fields[0] != fields[1]


def test_documents_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"text": "one"}, {"text": ""}]))
    assert read(open_source(f"jsonl:{path}", tmp_path)) == [
        Document(f"{path}, byte 0", "one"),
        Document(f"{path}, byte 16", ""),
    ]


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 30)
    path = tmp_path / "a.jsonl"
    rows = [
        {"token_ids": [5, 0, 70_000]},
        {"token_ids": [1, 2], "loss_mask": [0, 1], "id": "x"},
        {"token_ids": []},
    ]
    path.write_bytes(lines_of(rows))
    source = open_source(f"tokens:{path}", tmp_path)
    assert len(source.pieces("train")) == 4
    assert read(source) == [
        TokenDocument(f"{path}, byte 0", [5, 0, 70_000], None),
        TokenDocument(f"{path}, byte 29", [1, 2], [0, 1]),
        TokenDocument(f"{path}, byte 83", [], None),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"ids": [1]}', "has no field 'token_ids', only ids"),
        ('{"token_ids": 1}', "field 'token_ids' is a number, not an array"),
        ('{"token_ids": null}', "field 'token_ids' is null, not an array"),
        ('{"token_ids": [1, -2]}', "token_ids[1] is -2; it must be a whole number, 0 or more"),
        (f'{{"token_ids": [{2**63}]}}', f"token_ids[0] is {2**63}; it must be a whole number"),
        ('{"token_ids": [1.0]}', "token_ids[0] is 1.0; it must be a whole number"),
        ('{"token_ids": [1, true]}', "token_ids[1] is true; it must be a whole number"),
        ('{"token_ids": [1, "2"]}', 'token_ids[1] is "2"; it must be a whole number'),
        ('{"token_ids": [1], "loss_mask": [2]}', "loss_mask[0] is 2; it must be a whole number, 0"),
        ('{"token_ids": [1], "loss_mask": [true]}', "loss_mask[0] is true"),
        ('{"token_ids": [1], "loss_mask": null}', "field 'loss_mask' is null, not an array"),
        ('{"token_ids": [1], "loss_mask": [1, 1]}', "loss_mask has 2 entries for 1 token_ids"),
        ("[1, 2]", "is an array, not an object"),
    ],
)
def test_what_is_wrong_with_tokens(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"token_ids": [3]}}\n{line}\n')
    kept, (bad,) = bad_lines(f"tokens:{path}")
    assert kept == [[3]]
    assert (bad.file, bad.line, bad.byte_offset) == (str(path), 2, 19)
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize("scheme", ["text", "jsonl", "tokens"])
def test_a_file_that_is_cut_off_is_no_bad_line(tmp_path: Path, scheme: str) -> None:
    content = gzip.compress(lines_of([{"text": "a" * 100, "token_ids": [1]}] * 3))
    (tmp_path / "a.gz").write_bytes(content[:-1])
    with pytest.raises(
        BadLineError, match=r"a\.gz, line 4, .*the file is cut off: .* cannot be read"
    ):
        bad_lines(f"{scheme}:{tmp_path}/a.gz")


def test_lines_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilellm_jax.data.sources.source.PIECE_BYTES", 20)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    content = lines_of([{"text": text} for text in ("one", "two", "three")])
    memory.pipe({"/x/a.jsonl": content, "/x/b.jsonl.gz": gzip.compress(content)})
    source = open_source("jsonl:memory://x/*", tmp_path)
    assert texts(source) == ["one", "two", "three"] * 2
    assert [piece.size_bytes for piece in source.pieces("train")][:-1] == [16, 17, 17]
    assert read(source)[1].name == "memory:///x/a.jsonl, byte 16"
    memory.store.clear()
