"""Optimizers: the hooks around their steps, compact mode, and their state."""
