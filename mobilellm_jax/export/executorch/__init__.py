"""Writes models as ExecuTorch programs, and runs these programs."""
