"""Reads and writes Hugging Face directories without PyTorch."""
