"""Compares the logits that transformers computes from exported directories with our model's."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.huggingface import write_huggingface

# The tolerance covers float32 sums of some hundred terms in another order, through up to six
# layers.
TOLERANCE = 1e-4

LLAMA_CASES = {
    "unshared, tied, grouped": {},
    "immediate x2, untied, one key head": {
        "num_repeats": 2, "tie_embeddings": False, "num_kv_heads": 1
    },
    "immediate x3, tied, a key head per query head": {"num_repeats": 3, "num_kv_heads": 4},
    "repeat_all x2, tied, wide heads": {
        "num_repeats": 2, "sharing": "repeat_all", "head_dim": 24
    },
    "repeat_all x3, untied": {"num_repeats": 3, "sharing": "repeat_all", "tie_embeddings": False},
    "reverse x2, untied, narrow heads": {
        "num_repeats": 2, "sharing": "reverse", "tie_embeddings": False, "head_dim": 6
    },
    "reverse x3, tied": {"num_repeats": 3, "sharing": "reverse", "rope_theta": 500.0},
}  # fmt: skip
OWN_CASES = {
    "relu": {"activation": "relu"},
    "gelu, untied, reverse x2": {
        "activation": "gelu", "tie_embeddings": False, "num_repeats": 2, "sharing": "reverse"
    },
    "width not divisible by heads": {"num_heads": 6, "num_kv_heads": 3, "num_repeats": 2},
}  # fmt: skip


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def error(model, tokens_BT, logits_BTV) -> float:
    """Returns the largest difference of logits over the larger of 1 and the largest logit."""
    with torch.no_grad():
        theirs_BTV = model(torch.from_numpy(tokens_BT).long()).logits.numpy()
    assert theirs_BTV.dtype == np.float32
    return np.abs(theirs_BTV - logits_BTV).max() / max(1.0, np.abs(logits_BTV).max())


# Scale 1 is the standard initialisation. At 5 the blocks weigh as much as the embedding.
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("case", LLAMA_CASES)
def test_plain_llama_and_own_file_give_our_logits(case, scale, make_model, tokenizer, output):
    config, params, tokens_BT, logits_BTV = make_model(scale, **LLAMA_CASES[case])
    write_huggingface(config, params, tokenizer, output / "hf")
    llama = load(output / "hf")
    assert type(llama) is LlamaForCausalLM
    assert len(llama.model.layers) == config.applied_depth
    llama_error = error(llama, tokens_BT, logits_BTV)
    write_huggingface(config, params, tokenizer, output / "own", layout="mobilellm")
    own = load(output / "own", trust_remote_code=True)
    assert len(own.model.layers) == config.num_blocks
    own_error = error(own, tokens_BT, logits_BTV)
    print(f"{case}: scale={scale} hf={llama_error:.1e} mobilellm={own_error:.1e}")
    assert llama_error <= TOLERANCE
    assert own_error <= TOLERANCE


@pytest.mark.parametrize("case", OWN_CASES)
def test_own_file_gives_our_logits_where_llama_cannot(case, make_model, tokenizer, output):
    config, params, tokens_BT, logits_BTV = make_model(5.0, **OWN_CASES[case])
    write_huggingface(config, params, tokenizer, output, layout="mobilellm")
    own_error = error(load(output, trust_remote_code=True), tokens_BT, logits_BTV)
    print(f"{case}: mobilellm={own_error:.1e}")
    assert own_error <= TOLERANCE


@pytest.fixture(scope="module")
def shared_folder(make_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "own"
    config, params, _, _ = make_model(5.0, num_repeats=2, sharing="reverse", tie_embeddings=False)
    write_huggingface(config, params, tokenizer, folder, layout="mobilellm")
    return folder


def test_cached_generation_equals_uncached(shared_folder):
    model = load(shared_folder, trust_remote_code=True)
    prompt_BT = torch.tensor([[1, 40, 50, 60, 70]])
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    cached_BT = model.generate(prompt_BT, use_cache=True, **settings)
    assert cached_BT.shape == (1, 25)
    assert torch.equal(cached_BT, model.generate(prompt_BT, use_cache=False, **settings))
    assert len(set(cached_BT[0, 5:].tolist())) > 4  # not one token over and over


def test_every_application_has_a_cache_slot_of_its_own(shared_folder):
    model = load(shared_folder, trust_remote_code=True)
    tokens_BT = torch.arange(3, 23)[None]
    with torch.no_grad():
        whole_BTV = model(tokens_BT).logits
        outputs = model(tokens_BT[:, :12], use_cache=True)
        steps = [outputs.logits]
        for t in range(12, 20):
            outputs = model(
                tokens_BT[:, t : t + 1], past_key_values=outputs.past_key_values, use_cache=True
            )
            steps.append(outputs.logits)
    assert len(outputs.past_key_values) == 4
    torch.testing.assert_close(torch.cat(steps, dim=1), whole_BTV, atol=1e-4, rtol=0)


def test_left_padding_changes_nothing(shared_folder):
    model = load(shared_folder, trust_remote_code=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone_BT = model.generate(torch.tensor([[1, 40, 50]]), **settings)
    padded_BT = torch.tensor([[0, 0, 1, 40, 50], [1, 60, 61, 62, 63]])
    mask_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    both_BT = model.generate(padded_BT, attention_mask=mask_BT, **settings)
    assert both_BT[0, 5:].tolist() == alone_BT[0, 3:].tolist()


def test_padding_sees_itself_and_nothing_else(shared_folder):
    """Some versions of torch return NaN for a query that may see no key."""
    module = sys.modules[type(load(shared_folder, trust_remote_code=True)).__module__]
    mask_TS = module.causal_mask(torch.arange(1, 4), torch.tensor([[0, 0, 1, 1]]))[0, 0]
    assert mask_TS.int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_loss_is_mean_cross_entropy_of_the_next_token(shared_folder):
    model = load(shared_folder, trust_remote_code=True)
    tokens_BT = torch.arange(3, 19)[None]
    labels_BT = tokens_BT.clone()
    labels_BT[:, :4] = -100
    with torch.no_grad():
        outputs = model(tokens_BT, labels=labels_BT)
    logs_TV = outputs.logits[0].log_softmax(-1)
    expected = -logs_TV[3:15].gather(1, tokens_BT[0, 4:, None]).mean()
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_saves_and_loads_it_again(tied, make_model, tokenizer, tmp_path):
    config, params, tokens_BT, logits_BTV = make_model(5.0, num_repeats=2, tie_embeddings=tied)
    write_huggingface(config, params, tokenizer, tmp_path / "a", layout="mobilellm")
    load(tmp_path / "a", trust_remote_code=True).save_pretrained(tmp_path / "b")
    keys = ("layer_sharing", "share_embedding", "tie_word_embeddings", "num_hidden_layers")
    first, second = (json.loads((tmp_path / d / "config.json").read_text()) for d in "ab")
    assert {k: second[k] for k in keys} == {k: first[k] for k in keys}
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in "ab"]
    assert abs(sizes[0] - sizes[1]) < 200  # padding of the header
    again = load(tmp_path / "b", trust_remote_code=True)
    assert (again.get_input_embeddings() is again.get_output_embeddings()) == tied
    assert error(again, tokens_BT, logits_BTV) <= TOLERANCE


def test_gradients_reach_every_parameter(shared_folder):
    model = load(shared_folder, trust_remote_code=True).train()
    tokens_BT = torch.arange(3, 19)[None]
    model(tokens_BT, labels=tokens_BT).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_tokenizer_beside_it_loads(shared_folder, tokenizer):
    theirs = AutoTokenizer.from_pretrained(shared_folder, trust_remote_code=True)
    assert theirs("The dog")["input_ids"] == [tokenizer.bos_id, *tokenizer.encode("The dog")]


def test_a_mask_that_the_cache_does_not_explain_is_refused(make_model, tokenizer, output):
    config, params, tokens_BT, _ = make_model(num_repeats=2)
    write_huggingface(config, params, tokenizer, output, layout="mobilellm")
    own = load(output, trust_remote_code=True)
    tokens = torch.from_numpy(tokens_BT[:, :1]).long()
    with pytest.raises(ValueError, match="covers 9 tokens, but there are 0 in the cache and 1 new"):
        own(tokens, attention_mask=torch.ones(2, 9))
