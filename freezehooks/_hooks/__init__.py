"""When: the hooks on modules and parameters, and the one write they share."""
