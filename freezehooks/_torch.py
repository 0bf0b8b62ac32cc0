"""Everything private of torch that freezehooks needs, each with the version it was seen in."""
