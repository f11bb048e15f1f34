import dataclasses
import json
from pathlib import Path

import jax
import pytest

from mobilellm_jax.config import MeshConfig, ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.evaluate.journal import Journal, identity, key
from mobilellm_jax.model.transformer import Params, init_params
from mobilellm_jax.sharding import make_mesh, replicated

CONFIG = ModelConfig(
    vocab_size=300,
    embed_dim=16,
    num_blocks=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=24,
    max_seq_len=32,
)
WHOSE = {"weights": "abc"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(["the cat sat on the mat and the dog ran\n" * 20], 300, file)


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(CONFIG, jax.random.key(0))


def test_answers_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, WHOSE)
    journal.add([("a", [-1.25, True]), ("b", "text\u2028 with\nlines")])
    # The answers are on disk without closing the journal. A kill leaves part of a line.
    with path.open("a") as file:
        file.write('["c", [-0.5, tr')
    again = Journal(path, WHOSE)
    assert again.answers == {"a": [-1.25, True], "b": "text\u2028 with\nlines"}
    assert not again.replaced
    again.add([("d", "one")])
    assert Journal(path, WHOSE).answers == {**again.answers, "d": "one"}


@pytest.mark.parametrize(
    "line", ["not JSON", "\xff", "[1]", '["x"]', '["x", 1]', '["x", [1.0]]', '["x", [true, true]]']
)
def test_a_damaged_answer_is_asked_again(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal"
    Journal(path, WHOSE).add([("a", "one"), ("b", "two")])
    lines = path.read_bytes().split(b"\n")
    lines[1] = line.encode("latin-1")
    path.write_bytes(b"\n".join(lines))
    assert Journal(path, WHOSE).answers == {"b": "two"}


def test_answers_of_another_model_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, WHOSE).add([("a", 1)])
    other = Journal(path, {"weights": "def"})
    assert (other.answers, other.replaced) == ({}, True)
    assert Journal(path, {"weights": "def"}).replaced is False


def test_a_finished_journal_is_removed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", WHOSE)
    assert (tmp_path / "journal").is_file()
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_answers_are_kept_in_memory() -> None:
    journal = Journal(None, WHOSE)
    journal.add([("a", 1)])
    assert journal.answers == {"a": 1}
    journal.remove()


def test_different_requests_have_different_keys() -> None:
    requests = [("likelihood", [1, 2], [3]), ("likelihood", [1], [2, 3]), ("text", [1, 2], [3])]
    assert len({key(*request) for request in requests}) == 3
    assert key("likelihood", [1, 2], [3]) == key("likelihood", [1, 2], [3])


def test_identity_does_not_depend_on_the_mesh(params: Params, tokenizer: Tokenizer) -> None:
    here = identity(CONFIG, params, tokenizer)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    spread = jax.device_put(params, replicated(mesh))
    sharded = jax.device_put(
        params["embedding"]["table"],
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp")),
    )
    spread["embedding"]["table"] = sharded
    assert identity(CONFIG, spread, tokenizer) == here
    assert identity(CONFIG, jax.device_get(params), tokenizer) == here
    remat = dataclasses.replace(CONFIG, remat="full", scan_unroll=2)
    assert identity(remat, params, tokenizer) == here
    json.dumps(here)


def test_identity_changes_with_model_weights_type_and_tokenizer(
    params: Params, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    table = params["embedding"]["table"]

    def with_table(table: jax.Array) -> Params:
        return {**params, "embedding": {"table": table}}

    other_tokenizer = train_tokenizer(
        ["other words, and some more of them"] * 20, 280, tmp_path / "tokenizer.model"
    )
    identities = [
        identity(CONFIG, params, tokenizer),
        identity(CONFIG, params, other_tokenizer),
        # Attention in 8 bits changes no weight.
        identity(CONFIG, params, tokenizer, "w8a8: attention in 8 bits"),
        identity(dataclasses.replace(CONFIG, rope_theta=5.0), params, tokenizer),
        identity(dataclasses.replace(CONFIG, compute_dtype="bfloat16"), params, tokenizer),
        # One weight differs in its last bit; two rows or two neighbours are swapped.
        identity(CONFIG, with_table(table.at[7, 3].multiply(1 + 1e-7)), tokenizer),
        identity(CONFIG, with_table(table.at[0].set(table[1]).at[1].set(table[0])), tokenizer),
        identity(
            CONFIG,
            with_table(table.at[0, 0].set(table[0, 1]).at[0, 1].set(table[0, 0])),
            tokenizer,
        ),
    ]
    assert len({json.dumps(each) for each in identities}) == len(identities)
