"""Measures how good a model is: validation loss, perplexity of a text, and scores on tasks."""
