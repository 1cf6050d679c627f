"""Dotted paths of modules and of what they hold."""

from __future__ import annotations

from typing import Any


def joined(*names: str) -> str:
    """The path through these names; empty ones stand for the module itself."""
    return ".".join(filter(None, names))


def at(root: Any, path: str) -> Any:
    """What is there; ``root`` itself for an empty path."""
    found = root
    for name in path.split(".") if path else ():
        found = getattr(found, name)
    return found
