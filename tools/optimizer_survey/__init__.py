"""Checks that frozen entries hold, and nothing else changes, under third-party optimizers."""
