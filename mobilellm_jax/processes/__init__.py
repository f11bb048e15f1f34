"""Several processes of one run: connect, watch each other, lock the folder, stop early."""
