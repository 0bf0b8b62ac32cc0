"""Rules: regions, patterns and values as the user writes them, as text or in Python. Does not import torch."""
