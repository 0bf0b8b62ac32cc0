"""Keep pytest, which looks for doctests everywhere, from importing what only mypy should read."""

collect_ignore_glob = ["*.py"]
