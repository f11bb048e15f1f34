"""Turns sources into token shards in several processes, and continues after interruptions."""
