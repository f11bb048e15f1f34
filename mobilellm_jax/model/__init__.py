"""The MobileLLM decoder (Liu et al. 2024, arXiv:2402.14905) as Flax linen modules.

Arrays end in a shape suffix, one capital per axis. The legend, for the whole project:

| letter | axis | letter | axis |
|---|---|---|---|
| B | batch | H | head dim |
| T | query position | V | vocabulary |
| S | key position | U | unique blocks (the axis of the scan) |
| D | embed (residual stream) | R | repeats per block |
| F | hidden of the feed-forward | L | applied layers, U * R, in order of application |
| N | query heads | P | packed documents |
| K | key and value heads | Q | channels of all query heads, N * H |
| G | query heads per key head, N = K * G | W | key heads of all rows, B * K |

Two axes of one array never share a letter, a fixed size is a digit, and scalars, pytrees and
modules carry no suffix.
"""
