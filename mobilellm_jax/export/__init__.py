"""Exports: model files for other programs, and Hugging Face directories read back."""
