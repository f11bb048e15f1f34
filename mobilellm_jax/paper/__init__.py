"""The paper's tables as data, and its ablation grids at three scales."""
