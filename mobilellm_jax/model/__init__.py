"""The MobileLLM decoder (Liu et al. 2024, arXiv:2402.14905) as Flax linen modules.

Read `transformer.py` first, then `block.py`, `attention.py` and `layer_sharing.py`.

The name of an array ends in a shape suffix with one capital letter per axis. The whole project uses
these letters:

| letter | axis | letter | axis |
|---|---|---|---|
| B | batch | H | channels of one head |
| T | query position | V | vocabulary |
| S | key position | U | unique blocks (the axis of the scan) |
| D | embedding (residual stream) | R | repeats per block |
| F | hidden channels of the feed-forward | L | applied layers, U * R, in order of application |
| N | query heads | C | positions of one chunk or of one block of queries |
| K | key and value heads | M | rows of a matrix product, G * T or G * C |
| G | query heads per key head, N = K * G | P | pairs of channels that RoPE rotates, H / 2 |
| W | key heads of all batch rows, B * K | J | matrices that decoding joins for one product |
| Q | channels of all query heads, N * H | n | chunks |

Two axes of one array never share a letter. A digit in a suffix is a fixed size. Scalars, pytrees
and modules have no suffix. Packages without model arrays, such as `mobilellm_jax/data`, define
their own letters for axes.
"""
