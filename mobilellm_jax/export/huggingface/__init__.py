"""Hugging Face directories: read and written without PyTorch."""
