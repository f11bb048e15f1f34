"""Text in, batches out: sources, tokenizer, token shards on disk, and the loader over them.

`prepare` reads sources and writes a folder of token shards; `open_tokens` opens that folder;
`train_batches` and `validation_batches` turn it into NumPy batches. All of it runs on the host.
"""
