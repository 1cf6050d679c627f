"""Runs every Python block of the documentation: each page's blocks in order, in one namespace."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from revify._refusals import REASONS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```python\b[^\n]*\n(.*?)^\1```\s*?$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[str]:
    """The source of each block, moved to its line in the page, so that a traceback names that line."""
    return ["\n" * text.count("\n", 0, match.start(2)) + textwrap.dedent(match[2]) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p.read_text())], ids=lambda p: p.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for source in python_blocks(page.read_text()):
        exec(compile(source, str(page), "exec", dont_inherit=True), namespace)


def test_every_block_is_found() -> None:
    """No fence is missed by the pattern: one that is opened but not matched would never run."""
    for page in PAGES:
        text = page.read_text()
        assert len(python_blocks(text)) == len(re.findall(r"```\s*(?:python|py)\b", text)), page


def test_a_wrong_block_fails() -> None:
    (source,) = python_blocks("text\n\n```python\nassert 1 + 1 == 3\n```\n")
    with pytest.raises(AssertionError) as failure:
        exec(compile(source, "page.md", "exec"))
    assert failure.traceback[-1].lineno == 3  # counted from 0: the block's line in the page


def test_every_reason_of_a_refusal_has_its_line_and_anchor() -> None:
    page = (ROOT / "docs" / "refusals.md").read_text()
    for code, reason in REASONS.items():
        assert re.search(rf"^\|[^|]*`{code}`[^|]*\|.*\| *{reason.when} *\|?", page, re.MULTILINE), code
        assert f"{{#{code}}}" in page or f'id="{code}"' in page, code
