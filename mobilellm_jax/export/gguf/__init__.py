"""Writes models as GGUF files, and runs these files in llama.cpp."""
