"""Several processes as one run: start-up, watching each other, the run's lock, exit codes."""
