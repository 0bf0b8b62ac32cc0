"""`python -m freezehooks`: the command line."""

from .cli import main

raise SystemExit(main())
