"""Generates text: decodes with a model, samples tokens, and turns tokens into text."""
