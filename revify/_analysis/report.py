"""What was converted, what was not, and why."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from revify._refusals import Refusal
from revify._table import table


@dataclass(frozen=True)
class UnitReport:
    """One residual addition: its name in the graph, its kind ("identity" or "transition") and the path of the
    original module that holds it."""

    name: str
    kind: str
    module: str


@dataclass(frozen=True)
class ChainReport:
    """One chain: its additions in order, how its streams begin and end, and, once a training step has been made with a
    memory budget, what was chosen to be kept."""

    name: str
    units: tuple[UnitReport, ...]
    entry: str
    exit: str
    choice: Any = None


@dataclass(frozen=True)
class Report:
    """The result of the analysis of a model. Prints as a table.

    Attributes:
        model: the name of the model's class.
        chains: what is converted. Each has a ``name``, its ``units``, how its streams begin and end (``entry``,
            ``exit``) and, once a training step has been made with a memory budget, the ``choice`` of what to keep. A
            unit has a ``name``, that of its addition in the graph, a ``kind``, "identity" or "transition", and a
            ``module``, the path of the original module that holds it.
        refusals: what is not converted. Each has ``where``, a module's path and the addition's name; a ``code``, one
            short stable word; and a ``message``, one sentence with the remedy.
        notes: what to know about the conversion.
    """

    model: str
    chains: tuple[ChainReport, ...]
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]

    @property
    def convertible(self) -> bool:
        """Whether there is anything to convert."""
        return bool(self.chains)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists and strings."""
        return asdict(self)

    def __str__(self) -> str:
        units = sum(len(chain.units) for chain in self.chains)
        lines = [
            f"{self.model}: {units} {_plural('residual unit', units)} in {len(self.chains)} "
            f"{_plural('reversible chain', len(self.chains))}, {len(self.refusals)} refused"
        ]
        rows = list(self._rows())
        if rows:
            lines += ["", table([_COLUMNS, *rows])]
        for title, entries in self._lists():
            lines += ["", f"{title}:", *map(_point, entries)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in _COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self._rows()
        )
        lists = "".join(
            f"<p>{title}</p><ul>" + "".join(f"<li>{html.escape(e)}</li>" for e in entries) + "</ul>"
            for title, entries in self._lists()
        )
        return f"<p><b>{html.escape(self.model)}</b></p><table><tr>{head}</tr>{body}</table>{lists}"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for chain in self.chains:
            for unit in chain.units:
                yield chain.name, unit.kind, unit.module or "(model)", unit.name

    def _lists(self) -> Iterator[tuple[str, list[str]]]:
        choices = [f"{chain.name}: {chain.choice}" for chain in self.chains if chain.choice is not None]
        lists = ("refused", [str(r) for r in self.refusals]), ("memory budget", choices), ("notes", list(self.notes))
        return ((title, entries) for title, entries in lists if entries)


_COLUMNS = ("chain", "kind", "module", "addition")


def _point(text: str) -> str:
    return textwrap.fill(
        text, 80, initial_indent="  - ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"
