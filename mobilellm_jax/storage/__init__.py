"""Files: JSON read within limits, folders sealed by checksums, names of a run's files."""
