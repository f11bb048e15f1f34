import dataclasses
from pathlib import Path

from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.data.tokenizers.tokenizer import Tokenizer
from mobilellm_jax.export.model_card import FILE, write_model_card
from mobilellm_jax.model.opened import OpenedModel


def card(
    folder: Path, tokenizer: Tokenizer, config: Config, step: int | None, measured: list[str]
) -> str:
    run = config if step is not None else None
    source = OpenedModel(config.model, {}, tokenizer, "runs/a", run, step)
    write_model_card(folder, source, stored="float32.", measured=measured)
    return (folder / FILE).read_text()


def test_a_model_of_unknown_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = Config(model=dataclasses.replace(ModelConfig(), num_blocks=3, num_repeats=2))
    text = card(tmp_path, tokenizer, config, None, [])
    assert "Exported by mobilellm-jax from `runs/a`." in text
    assert "| depth | 3 blocks, each applied 2 times (immediate): 6 layers |" in text
    assert "Not known: the model came from a Hugging Face directory." in text
    assert "Nothing: the export was not verified." in text


def test_a_run_and_its_measurements(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = Config(data=dataclasses.replace(Config().data, path=str(tmp_path / "gone")))
    text = card(tmp_path, tokenizer, config, 7, ["loss 1.5"])
    tokens = 7 * config.train.global_batch * config.data.seq_len
    assert f"| steps | 7 of {config.train.steps:,} |" in text
    assert f"| tokens | {tokens:,}, in windows" in text
    assert "gone` (100%), which is not there any more" in text
    assert "```\nloss 1.5\n```" in text
