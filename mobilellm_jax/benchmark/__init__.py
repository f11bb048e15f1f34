"""What an export costs on this machine: bytes, time and memory, in the runtime of its format.

Every model is measured in processes of its own (`measure.py`), in turn with the others, and what
they found becomes a table and a picture (`table.py`).
"""
