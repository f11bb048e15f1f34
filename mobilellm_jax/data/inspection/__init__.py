"""Shows the contents of a folder of token shards to the user."""
