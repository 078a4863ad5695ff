"""The page on an index: the README without what only the repository has. All else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

readme = Path("README.md").read_text(encoding="utf-8")
readme = re.sub(r"!\[[^]]*\]\([^)]*\)\s*(<sub>.*?</sub>\s*)?", "", readme, flags=re.DOTALL)  # pictures and captions
readme = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", readme)  # links to files
setup(long_description=readme, long_description_content_type="text/markdown")
