"""Training: a pure, sharded step, and a loop on the host that receives its data and its hooks."""
