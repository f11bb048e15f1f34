"""The paper's models, scores and ablation tables, and smaller models for the same comparisons."""
