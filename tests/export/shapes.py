"""The models that every device format is tested with, as fields of `tiny`, by name."""

SCALE = 6.0  # random matrices of this scale give logits as large as a trained model's

SHAPES: dict[str, dict[str, object]] = {
    "immediate": {"num_repeats": 2, "sharing": "immediate"},
    "repeat_all": {"num_repeats": 2, "sharing": "repeat_all"},
    "reverse": {"num_repeats": 3, "sharing": "reverse"},
    "untied": {"tie_embeddings": False, "rope_theta": 500.0, "norm_eps": 1e-3},
    "rope": {
        **{"rope_scaling": "llama3", "rope_factor": 8.0, "rope_theta": 100.0},
        "rope_original_len": 64,
    },
    "relu": {"activation": "relu", "head_dim": 24, "num_kv_heads": 1},
    "gelu": {"activation": "gelu", "head_dim": 10, "num_kv_heads": 4, "embed_dim": 60},
}
