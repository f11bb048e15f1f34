"""The five lines of a notebook in docs/models.md, and the numbers behind them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import mobilellm_jax
from mobilellm_jax.errors import MissingFileError, UserError
from mobilellm_jax.generation.loaded import LoadedModel
from tests import tiny
from tests.huggingface import write_huggingface

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a run and the same model as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("runs")
    params = tiny.random_params(tiny.MODEL)
    tokenizer = tiny.save_run(folder / "runs/quickstart", tiny.MODEL, params)
    write_huggingface(tiny.MODEL, params, tokenizer, folder / "hf")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return mobilellm_jax.load(folder / "hf", compute_dtype="float32")


def test_logits_and_the_greedy_text_are_those_of_transformers(
    model: LoadedModel, folder: Path
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    for text in ("the cat", "the cat sat on the mat " * 3):
        ids = model.tokens(text)
        with torch.no_grad():
            expected_TV = theirs(torch.tensor([ids])).logits[0].numpy()
        logits_TV = model.logits(text)
        assert logits_TV.shape == (len(ids), tiny.MODEL.vocab_size)
        assert np.abs(logits_TV - expected_TV).max() <= 1e-4 * np.abs(expected_TV).max()
        np.testing.assert_array_equal(model.logits(ids), logits_TV)
    ids = model.tokens("the cat")
    row = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    text = model.generate("the cat", max_new_tokens=8, temperature=0)
    assert "the cat" + text == model.tokenizer.decode(row)


def test_what_does_not_fit_the_model_is_refused(model: LoadedModel, folder: Path) -> None:
    for ids in ([], [1] * 65):
        with pytest.raises(
            UserError, match=rf"{len(ids)} tokens must be at least 1 and at most 64"
        ):
            model.logits(ids)
    with pytest.raises(UserError, match=r"The token 300 must be from 0 to 299"):
        model.logits([1, 300])
    with pytest.raises(UserError, match=r"temperature=-1"):
        model.generate("the", temperature=-1)
    with pytest.raises(MissingFileError, match="does not exist"):
        mobilellm_jax.load(folder / "nothing")


def test_the_lines_of_the_documentation_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/models.md").read_text()
    [block] = re.findall(r"```python\n(import mobilellm_jax\n.*?)```", text, re.DOTALL)
    assert len(list(filter(None, block.splitlines()))) == 5
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["model"], LoadedModel)


def test_the_import_of_the_package_loads_no_jax() -> None:
    code = "import sys, mobilellm_jax; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        mobilellm_jax.lod  # noqa: B018
