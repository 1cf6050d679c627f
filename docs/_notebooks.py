"""The tutorials as notebooks: each is made from its page. ``python docs/_notebooks.py`` writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
TUTORIALS = ("first-conversion", "fit-memory", "fine-tuning")
CODE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
LINK = "This page [as a notebook](notebooks/{}.ipynb).\n\n"


def path(tutorial: str) -> Path:
    return DOCS / "notebooks" / f"{tutorial}.ipynb"


def notebook(tutorial: str) -> str:
    """The notebook as text. What the page says that a block prints is the output of its cell."""
    page = (DOCS / f"{tutorial}.md").read_text().replace(LINK.format(tutorial), "")
    page = re.sub(r"\]\(([\w-]+\.md)", r"](../\1", page)
    cells: list[dict[str, Any]] = []
    end = 0
    for found in CODE.finditer(page):
        cells += [_markdown(page[end : found.start()]), _code(found[1], found[2])]
        end = found.end()
    cells = [cell for cell in [*cells, _markdown(page[end:])] if cell["source"]]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = {
        "cells": [{"id": f"cell-{i}", **cell} for i, cell in enumerate(cells)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": _lines(text)}


def _code(text: str, printed: str | None) -> dict[str, Any]:
    outputs = [] if printed is None else [{"name": "stdout", "output_type": "stream", "text": _lines(printed)}]
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": outputs, "source": _lines(text)}


def _lines(text: str) -> list[str]:
    return text.strip("\n").splitlines(keepends=True)


if __name__ == "__main__":
    path("").parent.mkdir(exist_ok=True)
    for name in TUTORIALS:
        path(name).write_text(notebook(name))
