"""Exports models for other programs, and reads Hugging Face directories."""
