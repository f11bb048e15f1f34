import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from mobilellm_jax.checkpoint import save_model
from mobilellm_jax.config import Config, DataConfig, ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.generation.generate import Request, generate
from mobilellm_jax.generation.sampling import GREEDY
from mobilellm_jax.model.transformer import Params, param_shapes
from mobilellm_jax.open_model import open_model
from mobilellm_jax.storage import sealing
from tests import tiny
from tests.huggingface import write_huggingface

TINY = ModelConfig(
    vocab_size=300,
    embed_dim=32,
    num_blocks=2,
    num_repeats=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_seq_len=64,
    attention="xla",
    compute_dtype="float32",
)
CONFIG = Config(model=TINY, data=DataConfig(seq_len=64))


@functools.cache
def shapes() -> Params:
    return param_shapes(TINY)


def params_of(step: int) -> Params:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes())


def assert_same(left: Params, right: Params) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer_of_few_words(tmp_path_factory.mktemp("sp"), 300)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Writes a run with the complete steps 9 and 20, and a step 100 that was cut off."""
    run = tmp_path_factory.mktemp("runs") / "quick"
    for step in (9, 20):
        made = run.with_name(f"made{step}")
        save_model(made, CONFIG, params_of(step), tokenizer)
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (made / "checkpoints" / "0").rename(run / "checkpoints" / str(step))
    shutil.copyfile(made / "config.json", run / "config.json")
    shutil.rmtree(run.with_name("made9"))
    shutil.rmtree(run.with_name("made20"))
    (run / "checkpoints" / "100.orbax-checkpoint-tmp").mkdir()
    return run


@pytest.fixture
def run(saved_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_run, tmp_path / "quick"))


def test_run_opens_at_its_latest_complete_step(saved_run: Path, tokenizer: Tokenizer) -> None:
    opened = open_model(saved_run)
    assert_same(opened.params, params_of(20))
    assert opened.step == 20
    assert opened.run_config == CONFIG
    assert opened.tokenizer.sha256 == tokenizer.sha256
    assert opened.origin == str(saved_run / "checkpoints" / "20")


def test_compute_dtype_and_attention_are_this_devices(saved_run: Path) -> None:
    opened = open_model(saved_run)
    assert (CONFIG.model.compute_dtype, CONFIG.model.attention) == ("float32", "xla")
    expected = dataclasses.replace(CONFIG.model, compute_dtype="auto", attention="auto")
    assert opened.config == expected


def test_step_folder_opens_that_step_however_it_is_named(
    saved_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = saved_run / "checkpoints" / "9"
    (tmp_path / "best").symlink_to(step)
    monkeypatch.chdir(step)
    for name in (step, f"{step}/", ".", tmp_path / "best"):
        opened = open_model(name)
        assert opened.step == 9
        assert_same(opened.params, params_of(9))


def test_step_folder_stands_alone(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "other" / "checkpoints" / "9"
    shutil.copytree(run / "checkpoints" / "9", alone)
    shutil.rmtree(run)
    assert_same(open_model(alone).params, params_of(9))


def test_huggingface_directory_computes_what_the_run_does(
    saved_run: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from_run = open_model(saved_run)
    write_huggingface(TINY, params_of(20), tokenizer, tmp_path / "hf", layout="hf")
    from_hf = open_model(tmp_path / "hf")
    assert (from_run.config.num_repeats, from_hf.config.num_repeats) == (2, 1)
    assert (from_hf.step, from_hf.run_config) == (None, None)
    assert from_hf.origin == str(tmp_path / "hf")
    prompt = [1, *from_hf.tokenizer.encode("the cat")]
    assert prompt[1:] == from_run.tokenizer.encode("the cat")
    texts = [
        generate(m.config, m.params, Request([prompt], max_new_tokens=40, sampling=GREEDY))
        for m in (from_run, from_hf)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0][0])) > 3


def test_mobilellm_directory_keeps_the_sharing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_huggingface(TINY, params_of(1), tokenizer, tmp_path / "hf", layout="mobilellm")
    opened = open_model(str(tmp_path / "hf"))
    assert opened.config.num_repeats == 2
    assert_same(opened.params, params_of(1))


def test_damaged_step_is_named_and_the_one_before_it_opened(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file,) = (run / "checkpoints" / "20" / "params" / "d").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    opened = open_model(run)
    assert opened.step == 9
    assert_same(opened.params, params_of(9))
    message = caplog.text
    assert f"Skipped: {run}/checkpoints/20 is damaged: {file} has SHA-256" in message
    assert "Step 9 is used instead" in message
    with pytest.raises(ValueError, match=rf"checkpoints/20 is damaged: {file} has SHA-256"):
        open_model(run / "checkpoints" / "20")


def test_missing_folder_names_the_near_miss(saved_run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"quikc' does not exist\. Did you mean quick\?"):
        open_model(saved_run.parent / "quikc")
    with pytest.raises(FileNotFoundError, match=r"zzz' does not exist\. It must be a run folder"):
        open_model(saved_run.parent / "zzz")
    with pytest.raises(
        FileNotFoundError, match=r"does not exist\. .*nowhere does not exist either"
    ):
        open_model(saved_run.parent / "nowhere" / "at all")


def test_missing_step_lists_the_steps(saved_run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"10' does not exist\. .* has the steps 9, 20\."):
        open_model(saved_run / "checkpoints" / "10")


def test_file_is_refused(saved_run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json' is a file, not a folder"):
        open_model(saved_run / "config.json")


def test_run_without_a_complete_step_says_so(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "9")
    shutil.rmtree(run / "checkpoints" / "20")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint yet"):
        open_model(run)


def test_other_folder_is_answered_with_what_was_looked_for_and_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a run folder .*; it holds nothing\."):
        open_model(tmp_path)
    for n in range(10):
        (tmp_path / f"{n}.tokens").touch()
    # this file alone does not make a Hugging Face directory
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds 0\.tokens, 1\.tokens, .*7\.tokens \.\.\.\."):
        open_model(tmp_path)


def test_tokenizer_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    words = " ".join(f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst")
    other = train_tokenizer([words], 310, tmp_path / "other.model")
    folder = epath.Path(run / "checkpoints" / "20")
    content = sealing.read_manifest(folder)
    shutil.copyfile(other.file, folder / "tokenizer" / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model has .* bytes, but its manifest says"):
        open_model(run / "checkpoints" / "20")
    sealing.seal(folder, {k: v for k, v in content.items() if k != "files"})
    with pytest.raises(ValueError, match=r"has 310 tokens, but .*model\.vocab_size=300"):
        open_model(run)


def test_huggingface_directory_without_tokenizer_is_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_huggingface(TINY, params_of(1), tokenizer, tmp_path / "hf")
    for file in (tmp_path / "hf").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        open_model(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
