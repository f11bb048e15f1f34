import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from mobilellm_jax.data.tokenizers.opening import copy_tokenizer
from mobilellm_jax.data.tokenizers.tokenizer import same_vocabulary
from mobilellm_jax.export.huggingface.directory import read_huggingface
from mobilellm_jax.export.huggingface.weight_files import write_tensors
from mobilellm_jax.model.size import parameter_count
from mobilellm_jax.model.transformer import Transformer
from tests.huggingface import write_huggingface

TOLERANCE = 1e-4  # as in test_modeling_mobilellm.py


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def values_of(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **changes):
    values = values_of(folder) | changes
    kept = {k: v for k, v in values.items() if v is not KEY_ABSENT}
    (folder / "config.json").write_text(json.dumps(kept))


KEY_ABSENT = object()


def assert_trees_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


# The test writes the layer order of a shared model by hand.
@pytest.mark.parametrize(
    ("sharing", "repeats", "order"),
    [
        ("immediate", 2, (0, 0, 1, 1, 2, 2)),
        ("repeat_all", 2, (0, 1, 2, 0, 1, 2)),
        ("reverse", 3, (0, 1, 2, 2, 1, 0, 0, 1, 2)),
    ],
)
def test_hf_writes_a_copy_per_application(
    sharing, repeats, order, tiny_config, tiny_params, tokenizer, output
):
    config = tiny_config(num_blocks=3, num_repeats=repeats, sharing=sharing)
    params = tiny_params(config)
    exported = write_huggingface(config, params, tokenizer, output)
    tensors = tensors_of(output)
    assert values_of(output)["num_hidden_layers"] == len(order) == exported.layers
    assert "lm_head.weight" not in tensors
    np.testing.assert_array_equal(
        tensors["model.embed_tokens.weight"], params["embedding"]["table"]
    )
    for layer, block in enumerate(order):
        up_DF = params["blocks"]["feed_forward"]["up"][block]
        np.testing.assert_array_equal(tensors[f"model.layers.{layer}.mlp.up_proj.weight"], up_DF.T)
        head_DH = params["blocks"]["attention"]["query"][block][:, 1]
        query_OD = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(query_OD[16:32], head_DH.T)
    assert exported.model_bytes == (output / "model.safetensors").stat().st_size


def test_mobilellm_writes_every_block_once(tiny_config, tiny_params, tokenizer, output):
    config = tiny_config(num_repeats=3, sharing="reverse")
    exported = write_huggingface(config, tiny_params(config), tokenizer, output, layout="mobilellm")
    assert sum(tensor.size for tensor in tensors_of(output).values()) == parameter_count(config)
    assert exported.layers == 2
    values = values_of(output)
    assert values["layer_sharing"] is True and values["share_embedding"] is True
    assert (output / "modeling_mobilellm.py").is_file()


def test_files_of_a_plain_llama(tiny_config, tiny_params, tokenizer, output):
    config = tiny_config(rope_theta=500.0)
    write_huggingface(config, tiny_params(config), tokenizer, output, dtype="bfloat16")
    assert sorted(file.name for file in output.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model_card.md",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert {file.stat().st_mode & 0o777 for file in output.iterdir()} == {0o644}
    theirs = LlamaConfig.from_pretrained(output)
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    values = values_of(output)
    assert values["rope_parameters"] == theirs.rope_parameters
    assert values["rope_theta"] == 500.0  # for transformers 4
    assert theirs.dtype == torch.bfloat16
    assert GenerationConfig.from_pretrained(output).eos_token_id == tokenizer.eos_id
    assert {t.dtype for t in tensors_of(output).values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_gives_the_same_bytes(
    tied, dtype, tiny_config, tiny_params, tokenizer, tmp_path
):
    config = tiny_config(tie_embeddings=tied, num_kv_heads=1, head_dim=24)
    for layout in ("hf", "mobilellm"):
        first, second = tmp_path / f"{layout}1", tmp_path / f"{layout}2"
        write_huggingface(config, tiny_params(config), tokenizer, first, layout=layout, dtype=dtype)
        found = read_huggingface(first)
        assert found.dtype == dtype
        write_huggingface(
            found.config, found.params, tokenizer, second, layout=layout, dtype=found.dtype
        )
        for file in first.iterdir():
            assert file.read_bytes() == (second / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "fields",
    [
        {"num_repeats": 3, "sharing": "reverse"},
        {"activation": "relu", "tie_embeddings": False},
        {"activation": "gelu", "num_repeats": 2, "sharing": "repeat_all"},
        {"num_heads": 6, "num_kv_heads": 3, "rope_theta": 500.0, "norm_eps": 1e-6},
    ],
)
def test_mobilellm_layout_comes_back(fields, tiny_config, tiny_params, tokenizer, output):
    config = tiny_config(**fields, compute_dtype="auto")
    params = tiny_params(config)
    write_huggingface(config, params, tokenizer, output, layout="mobilellm")
    tensors = tensors_of(output)
    (output / "model.safetensors").unlink()
    write_tensors(tensors.items(), output, shard_bytes=100_000)
    assert len(list(output.glob("model-*.safetensors"))) > 1
    found = read_huggingface(output)
    assert found.config == config
    assert_trees_equal(found.params, params)
    assert found.tokenizer.file == output / "tokenizer.json"
    assert same_vocabulary(found.tokenizer, tokenizer)


LLAMA = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


def random_llama(**changes):
    return random_model(LlamaForCausalLM, LlamaConfig, **changes)


def random_model(model_class, config_class, **changes):
    torch.manual_seed(0)
    model = model_class(config_class(**(LLAMA | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def our_error(folder, model, **fields) -> float:
    """Returns the largest scaled difference between the imported model's logits and `model`'s."""
    found = read_huggingface(folder)
    for name, value in fields.items():
        assert getattr(found.config, name) == value
    tokens_BT = np.random.default_rng(0).integers(0, 320, (2, 64))
    with torch.no_grad():
        theirs_BTV = model(torch.from_numpy(tokens_BT)).logits.numpy()
    transformer = Transformer(found.config)
    apply = jax.jit(lambda p, t: transformer.apply({"params": p}, t))
    logits_BTV = np.asarray(apply(found.params, tokens_BT.astype(np.int32)))
    largest = np.abs(theirs_BTV).max()
    assert largest > 1  # far from all alike
    error = np.abs(logits_BTV - theirs_BTV).max() / largest
    print(f"{folder.name}: {error:.1e}")
    return error


def test_import_of_what_transformers_saved(tokenizer, tmp_path):
    cases = {
        "tied, grouped": ({"tie_word_embeddings": True, "num_key_value_heads": 2}, "5GB"),
        "untied, plain, sharded": ({"tie_word_embeddings": False}, "100KB"),
        "wide heads, other angles": (
            {
                "head_dim": 24,
                "num_key_value_heads": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            },
            "5GB",
        ),
    }
    for name, (changes, shard_size) in cases.items():
        model = random_llama(**changes)
        model.save_pretrained(tmp_path / name, max_shard_size=shard_size)
        copy_tokenizer(tokenizer, tmp_path / name)
        expected = {
            "tie_embeddings": changes.get("tie_word_embeddings", False),
            "num_kv_heads": changes.get("num_key_value_heads", 4),
            "head_dim": changes.get("head_dim", 16),
            "rope_theta": changes.get("rope_parameters", {}).get("rope_theta", 10_000.0),
        }
        assert our_error(tmp_path / name, model, **expected) <= TOLERANCE
    assert (tmp_path / "untied, plain, sharded" / "model.safetensors.index.json").is_file()


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
# With 8 pairs and an original context of 64 tokens, the scaling keeps some pairs, slows down
# others, and mixes between them.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3], ids=["linear", "llama3"])
def test_a_model_with_scaled_rope_comes_in_and_goes_out_in_both_layouts(rope, tokenizer, tmp_path):
    model = random_llama(num_key_value_heads=2, rope_parameters=rope)
    model.save_pretrained(tmp_path / "theirs")
    copy_tokenizer(tokenizer, tmp_path / "theirs")
    error = our_error(
        tmp_path / "theirs", model, rope_scaling=rope["rope_type"], rope_factor=rope["factor"]
    )
    assert error <= TOLERANCE
    found = read_huggingface(tmp_path / "theirs")
    tokens_BT = torch.arange(128)[None]
    with torch.no_grad():
        expected_BTV = model(tokens_BT).logits
        for layout in ("hf", "mobilellm"):
            folder = tmp_path / layout
            write_huggingface(found.config, found.params, tokenizer, folder, layout=layout)
            again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
            torch.testing.assert_close(again(tokens_BT).logits, expected_BTV, atol=1e-4, rtol=1e-4)
            assert read_huggingface(folder).config == found.config
    # transformers 4 wrote the same model so:
    scaling = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    change_config(
        tmp_path / "theirs",
        rope_parameters=KEY_ABSENT,
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling | {"type": rope["rope_type"]},
    )
    assert read_huggingface(tmp_path / "theirs").config == found.config


def test_a_mistral_whose_window_covers_its_context_is_imported(tokenizer, tmp_path):
    for name, window in (("none", None), ("covers", 512)):
        model = random_model(
            MistralForCausalLM, MistralConfig, num_key_value_heads=2, sliding_window=window
        )
        model.save_pretrained(tmp_path / name)
        copy_tokenizer(tokenizer, tmp_path / name)
        assert our_error(tmp_path / name, model, num_kv_heads=2) <= TOLERANCE
    # transformers has 8 as the default of the key-value heads, and 4096 as that of the window.
    change_config(tmp_path / "none", num_key_value_heads=KEY_ABSENT)
    with pytest.raises(ValueError, match=r"model\.num_kv_heads=8"):
        read_huggingface(tmp_path / "none")


def test_a_config_that_other_programs_wrote_is_read(tokenizer, tmp_path):
    model = random_llama(num_key_value_heads=2, rms_norm_eps=9.999999747378752e-06)
    model.save_pretrained(tmp_path)
    copy_tokenizer(tokenizer, tmp_path)
    change_config(
        tmp_path,
        hidden_act="swish",
        head_dim=None,
        attention_bias=KEY_ABSENT,
        mlp_bias=None,
        pretraining_tp=1,
        _name_or_path="/somewhere",
        max_length=10**30,
        rope_scaling=None,
        quantization_config={"quant_method": "gguf", "dequantize": False},
        dtype=KEY_ABSENT,
        torch_dtype="float32",
    )
    assert our_error(tmp_path, model, norm_eps=9.999999747378752e-06, head_dim=16) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_transformers_saved_goes_back_bit_by_bit(dtype, tokenizer, tmp_path):
    model = random_llama(num_key_value_heads=2).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    copy_tokenizer(tokenizer, tmp_path / "theirs")
    found = read_huggingface(tmp_path / "theirs")
    assert found.dtype == dtype
    write_huggingface(found.config, found.params, tokenizer, tmp_path / "ours", dtype=found.dtype)
    theirs, ours = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("tied", [True, False])
def test_import_of_torch_weights(tied, tokenizer, tmp_path):
    model = random_llama(tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    copy_tokenizer(tokenizer, tmp_path)
    state = model.state_dict()
    assert "lm_head.weight" in state  # also where it is tied, as such files have it
    # Files of older versions hold this buffer.
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert our_error(tmp_path, model, tie_embeddings=tied) <= TOLERANCE


@pytest.fixture
def folder(tiny_config, tiny_params, tokenizer, output):
    """An untied plain Llama of two layers."""
    config = tiny_config(tie_embeddings=False)
    write_huggingface(config, tiny_params(config), tokenizer, output)
    return output


def drop_tensors(folder, *names, **added):
    tensors = {k: v for k, v in tensors_of(folder).items() if k not in names}
    save_file(tensors | added, folder / "model.safetensors")


def test_keys_of_the_papers_code(tokenizer, tmp_path):
    """The config has tie_word_embeddings false, share_embedding true, and repeats every block."""
    model = random_llama(tie_word_embeddings=True, num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    copy_tokenizer(tokenizer, tmp_path)
    change_config(
        tmp_path,
        architectures=["MobileLLMForCausalLM"],
        model_type="mobilellm",
        tie_word_embeddings=False,
        share_embedding=True,
        layer_sharing=False,
        rope_parameters=KEY_ABSENT,
        rope_scaling=None,
        rope_theta=10000.0,
    )
    assert our_error(tmp_path, model, tie_embeddings=True, num_repeats=1) <= TOLERANCE
    doubled = random_llama(tie_word_embeddings=True, num_key_value_heads=2, num_hidden_layers=4)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.layers."):
            block, rest = name.removeprefix("model.layers.").split(".", 1)
            for layer in (2 * int(block), 2 * int(block) + 1):
                state[f"model.layers.{layer}.{rest}"] = tensor
        else:
            state[name] = tensor
    doubled.load_state_dict(state)
    change_config(tmp_path, layer_sharing=True)
    assert our_error(tmp_path, doubled, num_repeats=2, sharing="immediate") <= TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "scaling 'yarn' is not supp"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'llama3' needs low_freq_factor",
        ),
        ({"rope_scaling": {"type": "linear"}}, "RoPE scaling 'linear' needs factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "only default, linear or llama3"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be silu"),
        ({"sliding_window": 256}, "sliding_window=256 is less than max_position_embeddings=512"),
        (
            {"model_type": "mistral", "max_position_embeddings": 8192},
            "sliding_window=4096 is less than max_position_embeddings=8192",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention are not"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 must be 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"model_type": KEY_ABSENT}, "has no model_type, so it does not describe a Hugging Face"),
        ({"model_type": "qwen2"}, "model_type='qwen2' must be llama, mistral or mobilellm"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM, Mistral"),
        ({"hidden_size": KEY_ABSENT}, "hidden_size=None must be a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number above 0"),
        ({"num_key_value_heads": 3}, "must be a multiple of model.num_kv_heads=3"),
        ({"num_attention_heads": 3, "head_dim": None}, "because there is no head_dim"),
        ({"model_type": "mobilellm", "hidden_act": "relu"}, "hidden_act='relu' must be silu gat"),
        ({"model_type": "mobilellm", "layer_sharing": True, "layer_sharing_order": "odd"}, "odd"),
    ],
)
def test_models_of_another_kind_are_refused(folder, changes, message):
    read_huggingface(folder)
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_huggingface(folder)


def test_all_that_is_unsupported_is_listed(folder):
    change_config(folder, attention_bias=True, hidden_act="relu", model_type="qwen2")
    with pytest.raises(ValueError, match=r"qwen2[^\n]*\nattention_bias[^\n]*\nhidden_act"):
        read_huggingface(folder)


def test_tensors_that_do_not_fit_are_listed_three_ways(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    drop_tensors(folder, "model.norm.weight", name, **{
        name: np.zeros((96, 32), np.float32), "model.layers.2.bias": np.zeros(1, np.float32)
    })  # fmt: skip
    with pytest.raises(ValueError) as caught:
        read_huggingface(folder)
    assert str(caught.value).splitlines()[1:] == [
        "missing: model.norm.weight",
        "unexpected: model.layers.2.bias",
        f"of another shape: {name} (96, 32), not (96, 64)",
    ]


def test_missing_embeddings_are_refused_and_torch_weights_beside_named(folder):
    """The safetensors that a bot made from MobileLLM-125M lacked the embeddings."""
    drop_tensors(folder, "model.embed_tokens.weight")
    with pytest.raises(ValueError, match=r"missing: model\.embed_tokens\.weight"):
        read_huggingface(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"move them away to read pytorch_model\.bin"):
        read_huggingface(folder)


def test_missing_head_is_refused_with_a_hint(folder):
    drop_tensors(folder, "lm_head.weight")
    with pytest.raises(
        ValueError, match=r"If the embeddings are also the head, set tie_word_embedd"
    ):
        read_huggingface(folder)


def test_head_beside_tied_embeddings_must_equal_them(folder):
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        read_huggingface(folder)
    embedding_VD = tensors_of(folder)["model.embed_tokens.weight"]
    drop_tensors(folder, **{"lm_head.weight": embedding_VD})
    found = read_huggingface(folder)
    assert "head" not in found.params and found.config.tie_embeddings


def test_a_head_that_the_papers_code_ignores_is_left_out_with_a_warning(folder, caplog):
    expected = read_huggingface(folder).params["embedding"]["table"]
    change_config(folder, model_type="mobilellm", share_embedding=True)
    found = read_huggingface(folder)
    np.testing.assert_array_equal(found.params["embedding"]["table"], expected)
    assert "head" not in found.params and found.config.tie_embeddings
    assert "lm_head.weight differs from model.embed_tokens.weight and is left out" in caplog.text


def test_weights_of_several_dtypes_count_as_float32(folder):
    half = {name: tensor.astype(np.float16) for name, tensor in tensors_of(folder).items()}
    norm_D = tensors_of(folder)["model.norm.weight"].astype(ml_dtypes.bfloat16)
    drop_tensors(folder, **half | {"model.norm.weight": norm_D})
    found = read_huggingface(folder)
    assert found.dtype == "float32"
    np.testing.assert_array_equal(found.params["final_norm"]["scale"], norm_D.astype(np.float32))


def test_what_is_no_directory_of_a_model_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a Hugging Face directory"):
        read_huggingface(tmp_path / "nothing")
    shutil.copytree(folder, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer; put its tokenizer\.model"):
        read_huggingface(tmp_path / "bare")
    for content, message in (("{", "is not JSON"), ("[]", r"config.json=\[\] must be an object")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_huggingface(folder)


def test_tokenizer_is_the_one_that_transformers_takes_if_it_fits_the_model(folder):
    assert read_huggingface(folder).tokenizer.file.name == "tokenizer.json"
    tokenizer_json = json.loads((folder / "tokenizer.json").read_text())
    tokenizer_json["added_tokens"].append({
        "id": 320, "content": "<call>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True
    })  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    assert read_huggingface(folder).tokenizer.file.name == "tokenizer.model"
    change_config(folder, vocab_size=384)  # More than the tokenizer has.
    larger = {
        name: np.zeros((384, 64), np.float32)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    drop_tensors(folder, **larger)
    assert read_huggingface(folder).tokenizer.file.name == "tokenizer.json"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "relu"}, r"activation=relu has two matrices.*--format=mobilellm"),
        ({"activation": "gelu"}, r"activation=gelu has two matrices.*--format=mobilellm"),
        ({"num_heads": 6}, r"embed_dim=64 is not a multiple of model\.num_heads=6.*=mobilellm"),
    ],
)
def test_hf_refuses_what_llama_cannot_express(
    fields, message, tiny_config, tiny_params, tokenizer, output
):
    config = tiny_config(**fields)
    with pytest.raises(ValueError, match=message):
        write_huggingface(config, tiny_params(config), tokenizer, output)
    assert not output.exists()


def test_nothing_is_left_of_an_export_that_fails(tiny_config, tiny_params, tokenizer, output):
    config = tiny_config()
    params = tiny_params(config)
    params["final_norm"]["scale"] = np.full(64, 1e6, np.float32)
    output.parent.mkdir(exist_ok=True)
    before = list(output.parent.iterdir())
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds.*in float16; use --dtype"):
        write_huggingface(config, params, tokenizer, output, dtype="float16")
    params["blocks"]["feed_forward"]["up"][1, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds.*in float32\."):
        write_huggingface(config, params, tokenizer, output)
    del params["final_norm"]
    with pytest.raises(ValueError, match="missing: final_norm/scale\nunexpected: none"):
        write_huggingface(config, params, tokenizer, output)
    assert list(output.parent.iterdir()) == before


def test_an_existing_folder_is_not_replaced(folder, tiny_config, tiny_params, tokenizer, tmp_path):
    config = tiny_config()
    with pytest.raises(ValueError, match="name a new folder"):
        write_huggingface(config, tiny_params(config), tokenizer, folder)
    (tmp_path / "empty").mkdir()
    write_huggingface(config, tiny_params(config), tokenizer, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
