"""What the site's build adds to the pages: files of the repository's root, and the version."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)


def on_config(config: Any) -> Any:
    config["copyright"] = f"revify {version('revify')}, MIT licence"
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    return INCLUDE.sub(lambda found: as_page((ROOT / found[1]).read_text()), markdown)


def as_page(text: str) -> str:
    """A file of the root, with its links as they are in ``docs/``."""
    text = re.sub(r"\]\(docs/", "](", text)
    for file, page in PAGES.items():
        text = text.replace(f"]({file}", f"]({page}")
    return text
