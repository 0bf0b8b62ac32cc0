"""Entry sets: which entries of a tensor a region selects, and how they are read and written."""
