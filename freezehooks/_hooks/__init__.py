"""Hooks: those on modules and parameters, and the batched writes that they share."""
