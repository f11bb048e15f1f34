"""Turns text into batches: sources, tokenizers, token shards, and the loader of the batches.

`prepare` reads sources and writes a folder of token shards. `open_tokens` opens this folder, and
`train_batches` and `validation_batches` read NumPy batches from it. All code here runs on the host.
"""
