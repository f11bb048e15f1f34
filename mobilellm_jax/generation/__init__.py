"""From a prompt to text: decoding with a cache, sampling, streamed text."""
