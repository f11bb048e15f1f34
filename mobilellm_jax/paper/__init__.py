"""The paper's models, scores and ablation tables as data, and smaller versions of its grids."""
