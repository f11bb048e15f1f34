"""Quantized models, after training and in training."""
