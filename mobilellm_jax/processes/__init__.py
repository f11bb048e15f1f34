"""Several processes as one run: start, watch each other, lock the folder, stop early."""
