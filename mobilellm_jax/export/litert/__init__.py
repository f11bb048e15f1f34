"""Writes models as LiteRT files, and runs these files."""
