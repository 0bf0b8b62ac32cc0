"""Whether entries hold, and nothing else changes, under every optimizer that others have written."""
