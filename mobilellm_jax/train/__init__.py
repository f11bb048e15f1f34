"""Training: a pure sharded step, and a host loop that is handed its batches, saving and eyes."""
