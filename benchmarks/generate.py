"""Generating text beside transformers.generate and llama.cpp: tokens/s on this machine's CPU.

    pip install torch transformers
    python benchmarks/generate.py --rounds=5
    python benchmarks/generate.py --dtype=bfloat16 --batch=8
    python benchmarks/generate.py --llama_bench=llama.cpp/build/bin/llama-bench --gguf=f32.gguf

All have the shape of --model, random weights, and continue prompts of --prompt tokens by --new
tokens, greedily; all take turns, round by round. Rates count new tokens over the whole time, the
prompt's included; medians, the spread, and our ratios at the end.

    ours      generate, parameters prepared once
    eager     transformers.generate with its static cache
    compiled  the same, its forward pass compiled by torch (needs a C++ compiler)
    llama.cpp llama-bench of --llama_bench on --gguf: its prompt time and decoding time, together.
              Its tokens cannot be compared here. For --batch greater than 1 give
              llama-batched-bench instead. A build for the machine that it runs on: where that
              one ends by a fault of AMX, build with -DGGML_NATIVE=OFF and the machine's AVX flags.

`--write_gguf=FILE` writes the same random weights for llama.cpp and ends (pip install gguf). The
greedy tokens of ours and of transformers are compared in float32, up to the first at which the two
likeliest logits are closer than rounding.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mobilellm_jax import generate
from mobilellm_jax.architectures import MOBILELLM
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.layer_sharing import application_order
from mobilellm_jax.model.transformer import Params, init_params
from mobilellm_jax.sampling import GREEDY

Contender = Callable[[], list[list[int]] | float]  # tokens, or the seconds that it measured itself


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="125m", choices=sorted(MOBILELLM))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", default="", help="contenders to leave out, with commas between")
    parser.add_argument("--llama_bench", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--write_gguf", type=Path)
    arguments = parser.parse_args()
    config = dataclasses.replace(
        MOBILELLM[arguments.model], compute_dtype=arguments.dtype, attention="xla"
    )
    params = init_params(config, jax.random.key(0))
    if arguments.write_gguf:
        _write_gguf(config, params, arguments.write_gguf)
        return
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
        print("WARNING: no figure for transformers: pip install torch transformers")
    if arguments.llama_bench and arguments.gguf:
        contenders["llama.cpp"] = functools.partial(_llama, arguments)
    else:
        print("WARNING: no figure for llama.cpp: not available without --llama_bench and --gguf")
    _compare(contenders, config, params, prompts, arguments)


def _ours(config: ModelConfig, params: Params, prompts: list[list[int]], new: int) -> Contender:
    prepared = generate.prepare(config, params)
    return functools.partial(
        generate.generate, config, prepared, prompts, max_new_tokens=new, sampling=GREEDY
    )


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
    """Returns the matrices of the unshared model, outputs first, by transformers' names."""
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


def _write_gguf(config: ModelConfig, params: Params, file: Path) -> None:
    """Writes the weights for speed's sake: the vocabulary is of made-up tokens."""
    import gguf

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "token_embd",
        "norm": "output_norm",
    }
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_blocks * config.num_repeats)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    for name, tensor in _matrices(config, params).items():
        prefix, layer, theirs = re.fullmatch(r"(layers\.(\d+)\.)?(.+)\.weight", name).groups()  # type: ignore[union-attr]
        writer.add_tensor(f"blk.{layer}." * bool(prefix) + f"{names[theirs]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama(arguments: argparse.Namespace) -> float:
    """Returns the seconds that llama.cpp takes for the prompts and the new tokens."""
    batch, prompt, new = arguments.batch, arguments.prompt, arguments.new
    command = [str(arguments.llama_bench), "-m", str(arguments.gguf), "-t", str(os.cpu_count())]
    if "batched" in arguments.llama_bench.name:
        sizes = ["-npp", str(prompt), "-ntg", str(new), "-npl", str(batch)]
        sizes += ["-c", str(batch * (prompt + new)), "--output-format", "jsonl"]
        lines = _output([*command, *sizes]).splitlines()
        [found] = [json.loads(line) for line in lines if line.startswith("{")]
        return float(found["t"])
    assert batch == 1, "for several rows give llama-batched-bench"
    found = json.loads(
        _output([*command, "-p", str(prompt), "-n", str(new), "-r", "1", "-o", "json"])
    )
    return sum(test["avg_ns"] for test in found) / 1e9


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _compare(
    contenders: dict[str, Contender],
    config: ModelConfig,
    params: Params,
    prompts: list[list[int]],
    arguments: argparse.Namespace,
) -> None:
    new = arguments.batch * arguments.new
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    first = {name: run() for name, run in contenders.items()}  # compiles
    for index in range(arguments.rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            result = run()
            elapsed = result if isinstance(result, float) else time.perf_counter() - began
            rates[name].append(new / elapsed)
        shown = "  ".join(f"{name} {r[-1]:.1f}" for name, r in rates.items())
        print(f"round {index + 1}: tokens/s  {shown}", flush=True)
    median = {name: statistics.median(r) for name, r in rates.items()}
    for name, value in median.items():
        spread = f"{min(rates[name]):.1f} to {max(rates[name]):.1f}"
        print(f"{name:10} {value:7.1f} tokens/s (median of {arguments.rounds}; {spread})")
    for peer in [name for name in median if name != "ours"]:
        print(f"ours / {peer} {median['ours'] / median[peer]:.2f}")
    theirs = first.get("eager") or first.get("compiled")
    if isinstance(theirs, list) and arguments.dtype == "float32":
        equal = [
            next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
            for x, y in zip(first["ours"], theirs, strict=True)  # type: ignore[arg-type]
        ]
        print(f"greedy tokens equal to transformers': the first {equal} of {arguments.new}")


if __name__ == "__main__":
    main()
