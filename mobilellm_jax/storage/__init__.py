"""Files: strict JSON, folders with checksums, atomic writes, locks, and names in a run folder."""
