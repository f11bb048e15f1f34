"""Writes models as StableHLO functions for XLA, and runs these functions."""
