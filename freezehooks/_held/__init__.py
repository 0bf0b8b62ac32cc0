"""At what: the constraints on a parameter, and the way from rules to the parameters of a model."""
