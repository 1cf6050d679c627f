"""A report, arranged to be drawn: a box for each block, in rows of blocks that a container holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from revify._analysis.report import Report

_MOST = 8  # units in one box, and refusals


@dataclass
class Box:
    """A module, with what is said of it.

    Attributes:
        row: the container that it is in.
        label: its place there.
        units: its converted additions, in order: the number of their chain, and whether it is a transition.
        codes: of what is refused.
    """

    row: str
    label: str
    units: list[tuple[int, bool]] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)

    @property
    def chain(self) -> int | None:
        """The chain that comes to it."""
        return self.units[0][0] if self.units else None


def boxes_of(report: Report, modules: Sequence[str]) -> list[Box]:
    """The boxes, in the order of ``modules``, which are the paths of all modules of the model."""
    boxes: dict[str, Box] = {}

    def box(path: str) -> Box:
        return boxes.setdefault(path, Box(*_split(path)))

    for i, chain in enumerate(report.chains):
        for unit in chain.units:
            box(unit.module).units.append((i, unit.kind == "transition"))
    for refusal in report.refusals:
        box(_module(refusal.where, set(modules))).codes.append(refusal.code)
    order = {path: i for i, path in enumerate(modules)}
    return [part for path in sorted(boxes, key=lambda path: order.get(path, -1)) for part in _parts(boxes[path])]


def _parts(box: Box) -> list[Box]:
    """The box, or, where it holds more than can stand in one, several."""
    count = max(len(box.units), len(box.codes))
    starts = range(0, count, _MOST)
    return [
        Box(box.row, box.label if i == 0 else "…", box.units[i : i + _MOST], box.codes[i : i + _MOST]) for i in starts
    ]


def _module(where: str, modules: set[str]) -> str:
    """The innermost module on the way to a refusal's place; the model itself has an empty path."""
    while where and where not in modules:
        where = where.rpartition(".")[0]
    return where


def _split(path: str) -> tuple[str, str]:
    """What blocks beside one another have in common, and the rest, which begins with a number where there is one:
    ``layer1`` and ``0``, ``encoder.layer`` and ``11.output``, ``layers.block_`` and ``3``."""
    parts = path.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbered:
        numbered = [i for i, part in enumerate(parts) if part[-1:].isdecimal()]
    if not numbered:
        return ".".join(parts[:-1]), parts[-1] or "(model)"
    i = numbered[-1]
    word = parts[i].rstrip("0123456789")
    row = ".".join([*parts[:i], word] if word else parts[:i])
    return row, ".".join([parts[i][len(word) :], *parts[i + 1 :]])
