"""What a folder of token shards holds, for the eyes of a person."""
