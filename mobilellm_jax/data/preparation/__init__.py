"""From sources to token shards, in several processes, resumable."""
