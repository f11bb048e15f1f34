"""Computes the parameters and FLOPs of an architecture by formulas.

Model FLOPs per token, forward and backward, are 6 * weights + 6 * applied depth * N * H * T. The
weights are those of all matrix multiplications, including the head. A shared weight counts once for
each application. The second term is the causal half of the two matrix multiplications in attention.
Every report of MFU names this convention.
"""

from mobilellm_jax.config import ModelConfig

FLOP_CONVENTION = "6 x matmul weights (each application, head included) + causal attention"


def block_matrix_parameters(config: ModelConfig) -> int:
    """Returns the number of weights in one block's matrices."""
    attention = 2 * config.embed_dim * config.head_dim * (config.num_heads + config.num_kv_heads)
    matrices = len(config.wide_matrices) + 1
    return attention + matrices * config.embed_dim * config.ffn_dim


def parameter_count(config: ModelConfig) -> int:
    """Returns the number of parameters, including norms; shared parameters count once."""
    embeddings = config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2)
    block = block_matrix_parameters(config) + 2 * config.embed_dim
    return embeddings + config.num_blocks * block + config.embed_dim


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Returns the training FLOPs per token in sequences of `seq_len` tokens."""
    depth = config.applied_depth
    weights = depth * block_matrix_parameters(config) + config.vocab_size * config.embed_dim
    return 6 * weights + 6 * depth * config.num_heads * config.head_dim * seq_len
