"""From text to batches: sources, tokenizers, token shards, and the loader that reads them.

`prepare` reads sources and writes a folder of token shards. `open_tokens` opens this folder, and
`train_batches` and `validation_batches` read NumPy batches from it. All code here runs on the host.
"""
