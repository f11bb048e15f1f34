"""Files: strict JSON, folders with checksums, whole files, locks, and the names in a run folder."""
