"""Training: a pure, sharded step, and a loop on the host that calls the step."""
