"""Frozen parameters: the constraints on each, and how rules are resolved to the parameters of a model."""
