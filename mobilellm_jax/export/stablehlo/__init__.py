"""StableHLO for XLA: the writer, and the runtime that reads its file back."""
