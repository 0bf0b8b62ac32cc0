"""Ranks: the shard of a parameter on this rank, and whether all ranks agree about what is frozen."""
