"""Text from a model: decoding, sampling, and the text of a stream of tokens."""
