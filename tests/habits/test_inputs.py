"""People give files to read: through links, compressed, from the web, or other than they seem."""

import bz2
import gzip
import http.server
import itertools
import json
import lzma
import multiprocessing.synchronize
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard

from mobilellm_jax.cli.config_flags import load_config
from mobilellm_jax.cli.main import main
from mobilellm_jax.data.preparation.prepare import prepare
from mobilellm_jax.data.shards import Manifest, open_tokens
from mobilellm_jax.data.sources import finding, source
from mobilellm_jax.data.sources.opening import open_source
from mobilellm_jax.data.sources.source import BadLineError
from mobilellm_jax.data.tokenizers.opening import load_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate import tasks
from mobilellm_jax.storage.text_file import decoded_lines, read_lines, read_text
from tests.data.reading import texts
from tests.tiny import tokenizer_of_few_words

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 99999\n" % (b"0" * 64)
ROWS = "".join(json.dumps({"text": f"the cat sat on mat {i}"}) + "\n" for i in range(40)).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_of_few_words(tmp_path_factory.mktemp("tokenizer"), 280).file


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the list of the messages about found files, which grows during the test."""
    lines: list[str] = []
    monkeypatch.setattr(finding._log, "info", lines.append)
    monkeypatch.setattr(finding._log, "warning", lines.append)
    return lines


def write(path: str, content: bytes | str = "a heron waits in the reeds\n") -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def found(pattern: str) -> list[str]:
    return [file.path for file in finding.find("test", pattern)]


def read(spec: str) -> list[str]:
    return texts(open_source(spec, Path("scratch")))


def prepared(tokenizer: Path, *arguments: str) -> Manifest:
    assert main(["prepare", f"--tokenizer={tokenizer}", "--output=out", *arguments]) == 0
    return open_tokens(Path("out")).manifest


def test_somebody_has_links_that_lead_back_to_a_parent_folder() -> None:
    for folder in ("loop/a/x", "loop/a/y"):
        write(f"{folder}/f.txt")
        os.symlink("..", f"{folder}/up")
    os.symlink("a", "loop/alias")
    expected = ["loop/a/x/f.txt", "loop/a/y/f.txt"]
    assert found("loop/**/*.txt") == expected
    assert found("loop/*/*/f.txt") == expected
    assert found("loop/alias/**/*.txt") == ["loop/alias/x/f.txt", "loop/alias/y/f.txt"]
    assert found("**/x/../y/*.txt") == ["loop/a/x/../y/f.txt"]


def test_somebody_keeps_the_corpus_on_another_disk_behind_links(
    tmp_path: Path, log_lines: list[str]
) -> None:
    write("disk/1.txt")
    Path("corpus").mkdir()
    os.symlink(tmp_path / "disk", "corpus/linked")
    os.symlink("../disk/1.txt", "corpus/1.txt")
    assert found("corpus/**/*.txt") == ["corpus/1.txt"]
    assert "several paths lead to the same file through links" in "".join(log_lines)
    assert found("corpus/linked/*") == ["corpus/linked/1.txt"]


def test_somebodys_names_have_brackets_and_the_path_begins_with_a_tilde(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("[corpus] v1/1.txt", "page [3].txt", "page 3.txt", "part-1.txt", "part-3.txt"):
        write(name)
    assert found("[corpus] v1/*.txt") == ["[corpus] v1/1.txt"]
    assert found("page [3].txt") == ["page [3].txt"]
    assert found("page [[]3].txt") == ["page [3].txt"]
    assert found("part-[12].txt") == ["part-1.txt"]
    assert found(f"{tmp_path}/**/page [[]*") == [f"{tmp_path}/page [3].txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/part-*") == [f"{tmp_path}/part-1.txt", f"{tmp_path}/part-3.txt"]
    write("~/own.txt")
    assert found("~/*.txt") == ["~/own.txt"]
    for name in ("~nobody9", "$CORPUS", "${CORPUS}"):
        with pytest.raises(UserError, match=rf"only a shell replaces {re.escape(name)}, so write"):
            found(f"{name}/*.txt")


def test_somebody_has_not_fetched_a_file_of_dvc() -> None:
    write("broken/1.txt")
    os.symlink("../gone/2.txt", "broken/2.txt")
    for pattern in ("broken/*.txt", "**/*.txt", "broken/2.txt"):
        with pytest.raises(FileNotFoundError, match=r"broken/2\.txt -> \.\./gone/2\.txt leads now"):
            found(pattern)
    write("gone/2.txt")  # The remedy: the target is fetched,
    assert found("broken/*.txt") == ["broken/1.txt", "broken/2.txt"]
    Path("gone/2.txt").unlink()
    Path("broken/2.txt").unlink()  # or the link is deleted.
    assert found("broken/*.txt") == ["broken/1.txt"]


def test_somebody_has_not_mounted_the_disk_behind_a_link(log_lines: list[str]) -> None:
    write("corpus/1.txt")
    os.symlink("/no/such/disk", "corpus/more")
    assert found("corpus/**/*.txt") == ["corpus/1.txt"]
    assert "corpus/more is a link to /no/such/disk, which does not exist" in "".join(log_lines)


def test_somebody_has_a_pipe_beside_the_texts(log_lines: list[str]) -> None:
    write("corpus/1.txt")
    os.mkfifo("corpus/2.txt")
    assert found("corpus/*.txt") == ["corpus/1.txt"]
    assert "left out corpus/2.txt, because it is a pipe or a device" in "".join(log_lines)


@pytest.mark.parametrize(
    "compress", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress]
)
@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst", ".zstd"])
def test_somebody_compresses_with_any_program_under_any_name(
    compress: Callable[[bytes], bytes], ending: str
) -> None:
    write(f"x.jsonl{ending}", compress(ROWS))
    assert len(read(f"jsonl:x.jsonl{ending}")) == 40
    assert read(f"text:x.jsonl{ending}") == [ROWS.decode()]
    assert read_text("--text", Path(f"x.jsonl{ending}")) == ROWS.decode()


def test_somebodys_browser_decompressed_a_file_and_kept_its_name() -> None:
    write("x.jsonl.gz", ROWS)
    assert len(read("jsonl:x.jsonl.gz")) == 40


def test_somebodys_compressed_file_is_damaged() -> None:
    for content, message in ((b"", "cut off"), (gzip.compress(ROWS) + b"behind", "damaged")):
        write("x.jsonl.gz", content)
        with pytest.raises(BadLineError, match=message):
            read("jsonl:x.jsonl.gz")
    write("x.txt.gz", gzip.compress(ROWS)[:-9])
    with pytest.raises(UserError, match=r"--text=x\.txt\.gz is cut off.*fetch the file again"):
        read_text("--text", Path("x.txt.gz"))


def tar(content: bytes) -> bytes:
    return b"a.txt".ljust(257, b"\0") + b"ustar\0" + b"00".ljust(249, b"\0") + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "x is a Git LFS pointer, .* `git lfs pull`"),
        (
            b"/annex/objects/SHA256E-s5--" + b"0" * 64 + b"\n",
            "git-annex pointer, .* `git annex get`",
        ),
        (tar(b"text"), "x is a tar archive; unpack it with `tar -xf`"),
        (gzip.compress(tar(b"text"), mtime=0), "decompressed x is a tar archive"),
        (b"PK\x03\x04\xff\xff", "it looks like a zip archive: unpack it"),
        ("text".encode("utf-16"), "it looks like UTF-16 text: convert it with `iconv -f UTF-16"),
        (b"%PDF-1.7\n\xe2\xe3\xcf\xd3", "it looks like a PDF"),
    ],
)
def test_somebodys_file_is_not_what_its_name_says(content: bytes, message: str) -> None:
    write("x", content)
    for scheme in ("text", "jsonl", "tokens"):
        with pytest.raises(UserError, match=message):
            read(f"{scheme}:x")


def test_somebody_cloned_without_git_lfs(
    tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sources, tokenizers, weights, prompts and token folders: each names the remedy."""
    prepared(tokenizer, f"--source=jsonl:{write('rows.jsonl', ROWS)}")
    for name in (
        "late.jsonl",
        "t/tokenizer.json",
        "hf/model.safetensors",
        "prompts.txt",
        "y.parquet",
    ):
        write(name, POINTER)
    write("hf/config.json", "{}")
    write("early.jsonl", ROWS)
    capsys.readouterr()
    (shard,) = Path("out").glob("train*.tokens")
    kept = shard.read_bytes()
    shard.write_bytes(POINTER)
    for command in (
        ["prepare", "--source=jsonl:*.jsonl", "--vocab_size=270", "--output=new"],
        ["prepare", "--source=parquet:y.parquet", "--vocab_size=270", "--output=new"],
        ["prepare", "--source=jsonl:rows.jsonl", "--tokenizer=t", "--output=new"],
        ["inspect", "--data=out"],
        ["generate", "--checkpoint=hf", "--prompt_file=prompts.txt"],
    ):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert "is a Git LFS pointer" in error, error
        assert "`git lfs pull`" in error
        assert not Path("new").exists()
    shard.write_bytes(kept)
    assert main(["inspect", "--data=out"]) == 0


def test_somebodys_download_cache_lost_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    write("hf/config.json", json.dumps(LLAMA))
    os.symlink("../blobs/0123", "hf/model.safetensors")
    assert main(["import", "--source=hf", "--output=new"]) == 2
    assert "hf/model.safetensors is a link to ../blobs/0123, which" in capsys.readouterr().err


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 270,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "--config=x.py is a Git LFS pointer, .* `git lfs pull`"),
        ("def get_config(): pass".encode("utf-16"), "x.py: SyntaxError: .* UTF-16 text: convert"),
        (gzip.compress(b"{}", mtime=0), "x.py: SyntaxError: .* gzip compressed: decompress it"),
        (None, "--config=x.py is a link to gone.py, which does not exist; fetch the target"),
    ],
)
def test_somebodys_config_is_not_what_its_name_says(content: bytes | None, message: str) -> None:
    if content is None:
        os.symlink("gone.py", "x.py")
    else:
        write("x.py", content)
    with pytest.raises(UserError, match=message):
        load_config("x.py")


def test_somebodys_rows_are_behind_a_broken_link() -> None:
    Path("rows/piqa").mkdir(parents=True)
    os.symlink("gone", "rows/piqa/validation.jsonl")
    with pytest.raises(
        UserError, match=r"validation\.jsonl is a link to gone, which does not exist"
    ):
        tasks.load_tasks(["piqa"], data_dir=Path("rows"))


def test_somebody_renamed_the_tokenizer(tokenizer: Path) -> None:
    shutil.copy(tokenizer, "spm.bin")
    assert load_tokenizer(Path("spm.bin")).vocab_size == 280
    write("vocabulary.txt", "the\ncat\n")
    with pytest.raises(UserError, match=r"must be a SentencePiece \*\.model or"):
        load_tokenizer(Path("vocabulary.txt"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: Quiet(*args, directory=str(tmp_path))
    ) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()
        thread.join()


def test_somebody_reads_from_a_web_server(server: str) -> None:
    write("a.jsonl", ROWS)
    write("b.jsonl", gzip.compress(ROWS))
    assert len(read(f"jsonl:{server}/*.jsonl")) == 80
    assert len(read(f"jsonl:{server}/a.jsonl")) == 40
    with pytest.raises(UserError, match="the pattern matches nothing"):
        read(f"jsonl:{server}/c.jsonl")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/a", "http://127.0.0.1:1/*", "ftp://127.0.0.1:1/a"]
)
def test_somebodys_host_does_not_answer(url: str) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1/.* cannot be read .*check the address"):
        read(f"jsonl:{url}")


@pytest.mark.parametrize(
    ("length", "sent", "why"),
    [("40", 20, "received 20 of 40 bytes"), (None, 0, "it ends after 0 of "), (None, 900, None)],
)
def test_somebodys_connection_breaks_off(
    length: str | None, sent: int, why: str | None, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has died sends too few bytes; one that sends them in small pieces is slow."""

    def do_get(self: Quiet) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(ROWS[first : min(first + sent, last + 1)])

    write("a.jsonl", ROWS)
    monkeypatch.setattr(Quiet, "do_GET", do_get)
    if why is None:
        assert len(read(f"jsonl:{server}/a.jsonl")) == 40
        return
    with pytest.raises(
        UserError, match=rf"a\.jsonl cannot be read .*{why}.*start the same command"
    ):
        read(f"jsonl:{server}/a.jsonl")
    monkeypatch.undo()  # The remedy: the network works again.
    monkeypatch.chdir(Path("a.jsonl").absolute().parent)
    assert len(read(f"jsonl:{server}/a.jsonl")) == 40


def test_somebodys_prompts_come_from_windows_and_from_an_old_mac() -> None:
    lines = [b"\xef\xbb\xbfThe heron\r\n", b"one\rstill one\n", "a\u2028b\n".encode(), b"end"]
    expected = ["The heron", "one\rstill one", "a\u2028b", "end"]
    assert read_lines("--prompt_file", write("p.txt", b"".join(lines))) == expected
    assert list(decoded_lines(lines, "The standard input")) == expected
    write("p.txt", b"The heron\n\n")
    assert read_lines("--prompt_file", Path("p.txt")) == ["The heron", ""]
    with pytest.raises(UserError, match=r"The standard input, line 2, must be UTF-8, but byte 1"):
        list(decoded_lines([b"fine\n", b"a\xff"], "The standard input"))


def test_somebody_writes_prompts_with_the_shell(tmp_path: Path) -> None:
    """Bash gives `<(head prompts.txt)` as the name of a pipe."""
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(b"one\ntwo\n"))
    writer.start()
    assert read_lines("--prompt_file", Path("pipe")) == ["one", "two"]
    writer.join()


STORY = "".join(
    f"Scene {i}. The cat sat on the mat.\nThe dog ran to the cat.\n\n" for i in range(2000)
)


def words(split: str) -> list[str]:
    """Returns the text of each document of a split, in order."""
    dataset = open_tokens(Path("out"))
    stream, model = dataset.splits[split], load_tokenizer(dataset.tokenizer)
    starts = [*stream.document_starts(0, stream.tokens).tolist(), stream.tokens]
    ids = stream.read(0, stream.tokens)
    return [model.decode(ids[a:b].tolist()) for a, b in itertools.pairwise(starts)]


def test_somebody_prepares_the_single_text_file_of_nanogpt(
    tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("input.txt", STORY)
    prepared(tokenizer, "--source=text:input.txt", "--validation_fraction=0.1")
    [train], [validation] = words("train"), words("validation")
    assert train + validation == STORY
    assert train.endswith("\n\n")
    assert len(validation) == pytest.approx(0.1 * len(STORY), rel=0.2)
    error = capsys.readouterr().err
    assert "the last 10.0% of a document is the validation text" in error
    assert "WARNING" not in error


def test_somebody_prepares_two_files_and_neither_becomes_the_validation_text(
    tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a.txt", STORY)
    write("b.txt", STORY[: len(STORY) // 5])
    manifest = prepared(tokenizer, "--source=text:[ab].txt")
    share = manifest.splits["validation"].text_bytes / (1.2 * len(STORY))
    assert 0.005 < share < 0.02
    assert "".join(sorted([*words("train"), *words("validation")], key=len)[1:]) in (
        STORY + STORY[: len(STORY) // 5],
        STORY[: len(STORY) // 5] + STORY,
        *(a + b for a in words("train") for b in words("train")),
    )
    assert "WARNING" not in capsys.readouterr().err


def test_somebodys_validation_text_is_far_from_the_share_that_was_asked_for(
    tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"text": f"the cat {i} " * (1 if i else 9000)}) + "\n" for i in range(99)]
    for seed in range(50):  # Until the hash holds out the long document.
        write("rows.jsonl", "".join(rows).replace("cat 0", f"cat 0{seed}"))
        shutil.rmtree("out", ignore_errors=True)
        manifest = prepared(tokenizer, "--source=jsonl:rows.jsonl", "--validation_fraction=0.1")
        error = capsys.readouterr().err
        if manifest.splits["validation"].text_bytes > 50_000:
            break
    assert "WARNING: the validation text is 9" in error
    assert "not 10.0% as --validation_fraction asks" in error


def test_somebodys_loss_masks_leave_nothing_to_learn(
    tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(target: int, i: int) -> str:
        return json.dumps({"token_ids": [260, 261 + i], "loss_mask": [0, target]}) + "\n"

    command = [
        *("prepare", f"--tokenizer={tokenizer}", "--output=out", "--source=tokens:rows.jsonl"),
        "--validation_fraction=0",
    ]
    write("rows.jsonl", row(0, 0) + row(0, 1))
    assert main(command) == 2
    assert "No token of the 2 training documents is a target" in capsys.readouterr().err
    assert not Path("out").exists()
    # The remedies: some tokens are targets,
    write("rows.jsonl", row(0, 0) + row(1, 1))
    assert main(command) == 0
    assert "train: 1 of 2 documents have no target" in capsys.readouterr().err
    shutil.rmtree("out")
    # or there is no mask.
    write("rows.jsonl", (row(0, 0) + row(0, 1)).replace("loss_mask", "other"))
    assert main(command) == 0
    assert "no target" not in capsys.readouterr().err


def test_somebody_touches_a_source_and_prepares_again(
    tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a.jsonl", ROWS)
    file = write("b.jsonl", ROWS)
    command = ["prepare", f"--tokenizer={tokenizer}", "--source=jsonl:*.jsonl", "--output=out"]
    assert main(command) == 0

    def refusal() -> str:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "SHA-256" not in error
        return error

    before = file.stat().st_mtime_ns
    os.utime(file, (1, 1))
    touched = refusal()
    assert "b.jsonl was written again (at 1970-01-01" in touched
    assert "the size is the same" in touched
    # The remedy that the message names:
    subprocess.run(shlex.split(touched.split("`")[1]), check=True)
    assert file.stat().st_mtime_ns == before
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().err
    write("b.jsonl", ROWS + b"{}")
    assert f"b.jsonl has {len(ROWS) + 2:,} bytes and had {len(ROWS):,}" in refusal()
    write("c.jsonl")
    file.unlink()
    assert "(b.jsonl is gone, c.jsonl is new)" in refusal() or "c.jsonl is new" in refusal()


def test_somebodys_rows_have_an_unused_column_of_two_types() -> None:
    rows = [
        {"goal": "a", "id": 1, "label": 0, "meta": {"n": 1, "tags": [1]}},
        {"goal": "b", "id": "p-2", "label": "1", "meta": {"n": "x", "tags": ["y", None]}},
        {"goal": "c", "id": None, "label": 1, "meta": None},
    ]
    made = tasks.alike(rows)
    assert [row["id"] for row in made] == ["1", "p-2", None]
    assert [row["label"] for row in made] == ["0", "1", "1"]
    assert made[1]["meta"] == {"n": "x", "tags": ["y", None]}
    assert datasets.Dataset.from_list(made)[0]["meta"] == {"n": "1", "tags": ["1"]}
    assert tasks.alike([{"x": 1}, {"x": 2.5}]) == [{"x": 1}, {"x": 2.5}]


def test_somebody_evaluates_rows_with_mixed_ids() -> None:
    row = {"goal": "Boil water", "sol1": "heat it", "sol2": "cool it", "label": 0}
    lines = [json.dumps({**row, "id": name}) + "\n" for name in (1, "p-2")]
    write("rows/piqa/validation.jsonl", "".join(lines))
    made = tasks.local_rows("piqa", "rows", 0)["validation"]
    assert (made["id"], made["label"]) == (["1", "p-2"], [0, 0])


def test_somebody_prepares_in_a_container_without_shared_memory(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", missing)
    monkeypatch.setattr(source, "PIECE_BYTES", 500)  # Two workers need two pieces.
    write("rows.jsonl", ROWS)
    command = ["prepare", "--source=jsonl:rows.jsonl", f"--tokenizer={tokenizer}", "--output=out"]
    assert main([*command, "--workers=2"]) == 2
    assert "Function not implemented); use --workers=1" in capsys.readouterr().err
    assert main([*command, "--workers=1"]) == 0


@pytest.mark.parametrize("choice", [{"on_bad_line": "ignore"}, {"runner": "Beam"}])
def test_somebody_mistypes_a_choice_in_a_notebook(choice: dict[str, Any], tokenizer: Path) -> None:
    [(name, value)] = choice.items()
    write("rows.jsonl", ROWS)
    with pytest.raises(UserError, match=f"{name}={value!r} must be one of "):
        prepare(["jsonl:rows.jsonl"], Path("out"), tokenizer=tokenizer, **choice)
    assert not Path("out").exists()
