"""Where documents come from: files, tables, datasets, Python's own documentation."""
