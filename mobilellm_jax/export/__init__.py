"""Exports: model files for other programs, and Hugging Face directories read back.

Each format has a room with its writer and the runtime that reads its file back. `exporting.py` runs
an export in its runtime, compares it with the checkpoint, and only then gives it its name.
"""
