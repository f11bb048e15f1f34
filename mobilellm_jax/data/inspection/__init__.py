"""Shows a person the contents of a folder of token shards."""
