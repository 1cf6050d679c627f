"""Tables, as plain text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows under the first one, its columns as wide as they must be; the columns in ``right`` end flush."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return ("  " + "  ".join(cells)).rstrip()

    return "\n".join([line(rows[0]), line(["-" * width for width in widths]), *map(line, rows[1:])])


def html_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """The same in HTML, in the colours and the type of the page around it."""

    def line(tag: str, row: Sequence[str], style: str) -> str:
        sides = ("right" if i in right else "left" for i in range(len(row)))
        cells = (
            f'<{tag} style="text-align: {side}; padding: 0.15em 1.5em 0.15em 0; {style}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(row, sides, strict=True)
        )
        return f'<tr style="background: none">{"".join(cells)}</tr>'

    lines = [line("th", rows[0], "border-bottom: 1px solid"), *(line("td", row, "border: none") for row in rows[1:])]
    return f'<table style="border-collapse: collapse; font-size: inherit">{"".join(lines)}</table>'


def megabytes(count: float) -> str:
    """``12.3 MB`` (10^6 bytes)."""
    return f"{count / 1e6:,.1f} MB"
