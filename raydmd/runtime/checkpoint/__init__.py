"""Manifests and shards: what is saved of a run, by whom, where, and how it is read again."""
