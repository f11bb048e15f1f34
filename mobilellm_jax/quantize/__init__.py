"""Quantized models: which schemes there are, after training and during it.

The integers and what is computed with them are in `model/quantized.py`; here is what becomes of a
whole model's parameters.
"""
