"""What was converted, what was not, and why; and, where a step has been seen, what it keeps."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from revify._refusals import Refusal
from revify._table import html_table, megabytes, table


@dataclass(frozen=True)
class UnitReport:
    """One residual addition.

    Attributes:
        name: of the addition in the graph.
        kind: "identity" or "transition".
        module: the path of the original module that holds it.
        swallowed: the residual additions inside of its branch, which are evaluated with it and are no units of their
            own: the path of the module that holds each, and its name.
    """

    name: str
    kind: str
    module: str
    swallowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChainReport:
    """One chain.

    Attributes:
        name: as messages have it.
        units: its additions, in order.
        entry: how its streams begin.
        exit: how they end.
        choice: of what to keep, a `Choice`; None where no step has been seen.
    """

    name: str
    units: tuple[UnitReport, ...]
    entry: str
    exit: str
    choice: Any = None


@dataclass(frozen=True)
class Kept:
    """What is kept between the forward and the backward pass, in bytes; each storage once, where it is first saved.

    Attributes:
        kind: "chain", "stem" (what lies ahead of the first chain), or "module" for what lies outside of both.
        name: of the chain, or the path of the module whose own forward keeps it.
        stored: with stored activations (`store_activations`).
        reversible: by the converted model.
    """

    kind: str
    name: str
    stored: int
    reversible: int

    @property
    def where(self) -> str:
        """As the report prints it."""
        return self.name or {"stem": "(stem)", "module": "(model)"}[self.kind]


@dataclass(frozen=True)
class Report:
    """The result of the analysis of a model. Prints as tables, and shows as such in a notebook.

    Attributes:
        model: the name of the model's class.
        chains: what is converted, as `ChainReport`.
        refusals: what is not converted. Each has ``where``, a module's path and the addition's name; a ``code``, one
            short stable word; and a ``message``, one sentence with the remedy.
        notes: what to know about the conversion.
        kept: what a training step on the example inputs keeps, as `Kept`: the chains, the stem, then modules, those
            that keep most first. Parameters, inputs and the loss do not count. Empty where no inputs were given, or
            where the model needs their values.
    """

    model: str
    chains: tuple[ChainReport, ...]
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]
    kept: tuple[Kept, ...] = ()

    @property
    def convertible(self) -> bool:
        """Whether there is anything to convert."""
        return bool(self.chains)

    @property
    def least_budget(self) -> float | None:
        """The fraction of their activations that the chains keep in any case, so that a smaller ``memory_budget``
        changes nothing; None where no step has been seen."""
        choices = [chain.choice for chain in self.chains]
        if not choices or not all(choice is not None and choice.flat for choice in choices):
            return None
        plain: int = sum(choice.plain for choice in choices)
        return min(1.0, self._flat / max(1, plain))

    @property
    def _flat(self) -> int:
        return sum(chain.choice.flat for chain in self.chains)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings and numbers."""
        return {**asdict(self), "least_budget": self.least_budget}

    def __str__(self) -> str:
        lines = [self._headline()]
        for title, rows, right in self._tables():
            lines += ["", *([f"{title}:", ""] if title else []), table(rows, right)]
        for title, entries in self._lists():
            lines += ["", f"{title}:", *map(_point, entries)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        tables = "".join(f"<p>{title}</p>{html_table(rows, right)}" for title, rows, right in self._tables())
        lists = "".join(
            f"<p>{title}</p><ul>" + "".join(f"<li>{html.escape(e)}</li>" for e in entries) + "</ul>"
            for title, entries in self._lists()
        )
        return f"<p><b>{html.escape(self._headline())}</b></p>{tables}{lists}"

    def _headline(self) -> str:
        units = sum(len(chain.units) for chain in self.chains)
        return (
            f"{self.model}: {_count(units, 'residual unit')} in {_count(len(self.chains), 'reversible chain')}, "
            f"{len(self.refusals)} refused"
        )

    def _tables(self) -> Iterator[tuple[str, list[tuple[str, ...]], tuple[int, ...]]]:
        """Title, rows and the columns that end flush."""
        units = [(chain.name, u.kind, u.module or "(model)", u.name) for chain in self.chains for u in chain.units]
        if units:
            yield "", [("chain", "kind", "module", "addition"), *units], ()
        if self.kept:
            shown = [row for row in self.kept if row.kind != "module"]
            modules = [row for row in self.kept if row.kind == "module"]
            parts = [(row.where, [row]) for row in (*shown, *modules[:_SHOWN])]
            parts += [(_count(len(rest), "other module"), rest) for rest in [modules[_SHOWN:]] if rest]
            rows = [(name, *_sums(kept)) for name, kept in [*parts, ("total", self.kept)]]
            yield "kept for the backward pass", [("where", "stored", "reversible"), *rows], (1, 2)

    def _lists(self) -> Iterator[tuple[str, list[str]]]:
        swallowed = [
            f"{u.module or '(model)'}, {u.name}: {len(u.swallowed)} ({', '.join(u.swallowed[:_SHOWN])}"
            f"{', ...' if u.swallowed[_SHOWN:] else ''})"
            for chain in self.chains
            for u in chain.units
            if u.swallowed
        ]
        spent = [(c.name, c.choice) for c in self.chains if c.choice is not None and c.choice.kept != c.choice.flat]
        choices = [f"{name}: {choice}" for name, choice in spent]
        if self.least_budget is not None:
            choices.append(f"less than {self.least_budget:.2g} ({megabytes(self._flat)}) changes nothing")
        yield from (
            (title, entries)
            for title, entries in (
                ("refused", [str(r) for r in self.refusals]),
                ("residual additions inside of branches", swallowed),
                ("memory budget", choices),
                ("notes", list(self.notes)),
            )
            if entries
        )


_SHOWN = 5  # of what is listed


def _point(text: str) -> str:
    return textwrap.fill(
        text, 80, initial_indent="  - ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _sums(rows: Sequence[Kept]) -> tuple[str, str]:
    return megabytes(sum(row.stored for row in rows)), megabytes(sum(row.reversible for row in rows))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
