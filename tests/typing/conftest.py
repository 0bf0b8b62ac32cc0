"""Keep pytest, which looks for doctests everywhere, from importing what only mypy shall read."""

collect_ignore_glob = ["*.py"]
