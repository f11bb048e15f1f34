"""Compares our generation with transformers.generate and llama.cpp, in tokens/s on this CPU.

    pip install torch transformers 'mobilellm-jax[export]'
    python benchmarks/generate.py --rounds=5
    python benchmarks/generate.py --dtype=bfloat16 --batch=8

All contenders have the shape of --model and the same random weights. They continue prompts of
--prompt tokens by --new tokens, greedily, and take turns in each round. A rate is the number of new
tokens divided by the whole time, including the prompt. The script prints medians, the spread, and
our ratios to the other contenders.

    ours       generate with parameters that are prepared once
    eager      transformers.generate with its static cache
    compiled   transformers.generate with torch.compile (needs a C++ compiler)
    llama.cpp  our GGUF export in --dtype with the default settings of llama.cpp (a float16 cache,
               fused attention at its choice); NumPy finds the likeliest token

In float32, the script also compares our greedy tokens with the greedy tokens of the others. If the
two highest logits are closer than rounding errors, the tokens may differ from this place on.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.tokenizers.training import train_tokenizer
from mobilellm_jax.generation import generate
from mobilellm_jax.generation.sampling import GREEDY
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.opened import OpenedModel
from mobilellm_jax.model.transformer import Params, init_params
from mobilellm_jax.paper.architectures import MOBILELLM

Contender = Callable[[], list[list[int]]]


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="125m", choices=sorted(MOBILELLM))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", default="", help="contenders to leave out, with commas")
    arguments = parser.parse_args()
    config = dataclasses.replace(
        MOBILELLM[arguments.model], compute_dtype=arguments.dtype, attention="xla"
    )
    params = init_params(config, jax.random.key(0))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}; {arguments.model} "
        f"{arguments.dtype}, batch {arguments.batch}, {arguments.prompt} + {arguments.new} tokens"
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, config.vocab_size, (arguments.batch, arguments.prompt)).tolist()
    skipped = arguments.skip.split(",")
    contenders: dict[str, Contender] = {"ours": _ours(config, params, prompts, arguments.new)}
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        for name in ("eager", "compiled"):
            if name not in skipped:
                contenders[name] = _transformers(config, params, prompts, arguments, name)
    else:
        print("WARNING: transformers is left out; pip install torch transformers")
    if importlib.util.find_spec("gguf") and importlib.util.find_spec("llama_cpp"):
        if "llama.cpp" not in skipped:
            contenders["llama.cpp"] = _llama_cpp(config, params, prompts, arguments.new)
    else:
        print("WARNING: llama.cpp is left out; pip install 'mobilellm-jax[export]'")
    _compare(contenders, arguments)


def _ours(config: ModelConfig, params: Params, prompts: list[list[int]], new: int) -> Contender:
    prepared = generate.prepare(config, params)
    request = generate.Request(prompts, max_new_tokens=new, sampling=GREEDY)
    return functools.partial(generate.generate, config, prepared, request)


def _transformers(
    config: ModelConfig,
    params: Params,
    prompts: list[list[int]],
    arguments: argparse.Namespace,
    name: str,
) -> Contender:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    model = _llama_of(config, params).to(getattr(torch, arguments.dtype)).eval()
    assert isinstance(model, transformers.LlamaForCausalLM)
    tokens = torch.tensor(prompts)
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(tokens),
        "do_sample": False,
        "max_new_tokens": arguments.new,
        "min_new_tokens": arguments.new,
        "cache_implementation": "static",
        "eos_token_id": None,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    if name == "compiled":
        model.forward = torch.compile(model.forward, dynamic=False)

    def run() -> list[list[int]]:
        with torch.inference_mode():
            found = model.generate(tokens, **settings)
        continued: list[list[int]] = found[:, tokens.shape[1] :].tolist()
        return continued

    return run


def _llama_of(config: ModelConfig, params: Params) -> Any:
    """Returns the same model in transformers, with the same weights."""
    import torch
    import transformers

    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=len(order),
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    names = {f"model.{k}": v for k, v in _matrices(config, params).items()}
    state = {name: torch.tensor(value) for name, value in names.items()}
    head = state["model.embed_tokens.weight"]
    if not config.tie_embeddings:
        head = torch.tensor(np.asarray(params["head"]["kernel"]).T.copy())
    llama.load_state_dict({**state, "lm_head.weight": head})
    return llama


def _matrices(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns the matrices of the unshared model by transformers' names, with outputs first."""
    blocks = jax.tree.map(np.asarray, params["blocks"])
    width = config.embed_dim
    found = {
        "embed_tokens.weight": np.asarray(params["embedding"]["table"]),
        "norm.weight": np.asarray(params["final_norm"]["scale"]),
    }
    order = application_order(config.num_blocks, config.num_repeats, config.sharing)
    for layer, u in enumerate(order):
        attention, feed_forward = blocks["attention"], blocks["feed_forward"]
        matrices = {
            "self_attn.q_proj": attention["query"][u].reshape(width, -1),
            "self_attn.k_proj": attention["key"][u].reshape(width, -1),
            "self_attn.v_proj": attention["value"][u].reshape(width, -1),
            "self_attn.o_proj": attention["output"][u].reshape(-1, width),
            "mlp.gate_proj": feed_forward["gate"][u],
            "mlp.up_proj": feed_forward["up"][u],
            "mlp.down_proj": feed_forward["down"][u],
        }
        found |= {f"layers.{layer}.{k}.weight": v.T.copy() for k, v in matrices.items()}
        for theirs, ours in (("input", "attention"), ("post_attention", "feed_forward")):
            norm = blocks[f"{ours}_norm"]["scale"][u]
            found[f"layers.{layer}.{theirs}_layernorm.weight"] = norm
    return found


def _llama_cpp(
    config: ModelConfig, params: Params, prompts: list[list[int]], new: int
) -> Contender:
    """Exports the model and loads it with a context for all prompts."""
    import llama_cpp

    from mobilellm_jax.export.gguf.runtime import load_model
    from mobilellm_jax.export.gguf.writer import write

    library: Any = llama_cpp.llama_cpp
    with tempfile.TemporaryDirectory() as name:
        # Few tokens have a text and the rest are padding, because only ids are used.
        tokenizer = train_tokenizer(["a b c"] * 9, 264, Path(name) / "tokenizer.model")
        source = OpenedModel(config, params, tokenizer, "random weights")
        write(source, Path(name), config.compute_dtype)
        model = load_model(Path(name) / "model.gguf", vocab_only=False)
    length = len(prompts[0])
    settings = library.llama_context_default_params()
    settings.n_ctx = len(prompts) * (length + new)
    settings.n_batch = settings.n_ubatch = len(prompts) * length
    settings.n_seq_max = len(prompts)
    settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
    context = library.llama_init_from_model(model, settings)
    batch = library.llama_batch_init(len(prompts) * length, 0, 1)

    def step(tokens_BT: list[list[int]], position: int) -> list[int]:
        batch.n_tokens = i = 0
        for sequence, tokens in enumerate(tokens_BT):
            for offset, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position + offset
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = offset == len(tokens) - 1
                i += 1
        batch.n_tokens = i
        assert library.llama_decode(context, batch) == 0, "llama.cpp failed"
        last = [sum(map(len, tokens_BT[: row + 1])) - 1 for row in range(len(tokens_BT))]
        rows = (library.llama_get_logits_ith(context, i) for i in last)
        return [int(np.ctypeslib.as_array(row, (config.vocab_size,)).argmax()) for row in rows]

    def run() -> list[list[int]]:
        library.llama_memory_clear(library.llama_get_memory(context), True)
        found = [step(prompts, 0)]
        for position in range(length, length + new - 1):
            found.append(step([[token] for token in found[-1]], position))
        return [list(row) for row in zip(*found, strict=True)]

    return run


def _compare(contenders: dict[str, Contender], arguments: argparse.Namespace) -> None:
    new = arguments.batch * arguments.new
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    first = {name: run() for name, run in contenders.items()}  # compiles
    for index in range(arguments.rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            rates[name].append(new / (time.perf_counter() - began))
        shown = "  ".join(f"{name} {r[-1]:.1f}" for name, r in rates.items())
        print(f"round {index + 1}: tokens/s  {shown}", flush=True)
    median = {name: statistics.median(r) for name, r in rates.items()}
    for name, value in median.items():
        spread = f"{min(rates[name]):.1f} to {max(rates[name]):.1f}"
        print(f"{name:10} {value:7.1f} tokens/s (median of {arguments.rounds}; {spread})")
    for peer in [name for name in median if name != "ours"]:
        print(f"ours / {peer} {median['ours'] / median[peer]:.2f}")
        if arguments.dtype == "float32":
            equal = [
                next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
                for x, y in zip(first["ours"], first[peer], strict=True)
            ]
            print(f"  greedy tokens equal: the first {equal} of {arguments.new}")


if __name__ == "__main__":
    main()
