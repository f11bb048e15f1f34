"""Sources of documents: text files, Parquet tables, TFDS datasets, Python's documentation."""
