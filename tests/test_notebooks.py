"""The notebooks are what their pages make, and hold the code that the pages' own tests run."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from tests.test_docs import ROOT, fences

_spec = importlib.util.spec_from_file_location("_notebooks", ROOT / "docs" / "_notebooks.py")
assert _spec is not None
assert _spec.loader is not None
notebooks: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)


@pytest.mark.parametrize("tutorial", notebooks.TUTORIALS)
def test_a_notebook_is_its_page(tutorial: str) -> None:
    text = notebooks.path(tutorial).read_text()
    assert text == notebooks.notebook(tutorial), "run `make notebooks`"
    cells = json.loads(text)["cells"]
    page = (ROOT / "docs" / f"{tutorial}.md").read_text()
    assert notebooks.LINK.format(tutorial) in page
    run = [fence.source.strip() for fence in fences(page) if fence.kind == "python"]
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] == run  # `test_page_runs` does
    written = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "```python" not in written
    assert "as a notebook" not in written
    links = [link for link in notebooks.re.findall(r"\]\(([^)#]+)", written) if "://" not in link]
    assert all((notebooks.path(tutorial).parent / link).exists() for link in links), links


def test_there_is_no_other() -> None:
    assert {file.stem for file in (ROOT / "docs" / "notebooks").iterdir()} == set(notebooks.TUTORIALS)


@pytest.mark.parametrize("tutorial", notebooks.TUTORIALS)
def test_the_format(tutorial: str) -> None:
    made = json.loads(notebooks.notebook(tutorial))
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
    if importlib.util.find_spec("nbformat") is not None:
        import nbformat

        nbformat.validate(nbformat.from_dict(made))
