"""On which rank: what of a parameter lies here, and whether all ranks agree."""
