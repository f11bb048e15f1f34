"""Quantized models, after training and in training.

`integers.py` rounds numbers. `kernels.py` and `attention.py` replace the float products of
`model/`. `schemes.py` names the ways to quantize. `parameters.py` quantizes a whole model.
"""
