"""The description for the package index: README.md with the links into this repository as plain words.

There they would lead nowhere. All other metadata is in setup.cfg.
"""

import re
from pathlib import Path

from setuptools import setup

_INTO_THE_REPOSITORY = re.compile(r"!?\[([^\[\]]*)\]\((?!https?://|#)[^()\s]*\)")

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(long_description=_INTO_THE_REPOSITORY.sub(r"\1", readme))
