"""Checkpoints in formats that others read, and Hugging Face directories read back.

`huggingface.py` holds the one table of names, `huggingface_config.py` config.json,
`weight_files.py` and `torch_files.py` the tensor files, `tokenizer_files.py` the tokenizer's;
`modeling_mobilellm.py` is a torch file that the `mobilellm` format carries along, which nothing
here imports.
"""
