"""What a conversion makes of a model: a box for each block, a band of colour for each chain."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import nn

from revify._analysis.report import Report
from revify._conversion.convert import explain, report
from revify._engine.chain import settings_of
from revify._tools.step import check_unused
from revify.plot._boxes import Box, boxes_of
from revify.plot._figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, checked_path, finished, picture, shortened

_CHAINS = (BLUE, GREEN, ORANGE, PURPLE, "#66aacc", "#998833")
_WIDTH, _MARGIN = 5.0, 0.12  # inches, as all lengths here
_LABELLED = 60  # blocks; of more there are small boxes without words
_LETTER = 0.07  # of a path, on average
_MARKER = 0.13


def graph(model: nn.Module, example_inputs: Any = None, *, path: str | Path | None = None, **options: Any) -> Figure:
    """What `convert` makes of a model, as `explain` says it, or has made of it: a box for each block, in the order of
    the model; a band of colour for each chain; a mark for each addition, a dot where the skip is the identity and a
    diamond where it is a transition; what is refused in red, with its code.

    Args:
        model: any model, or what `convert` made of one.
        example_inputs: as for `explain`.
        path: a file to save the picture in; the name's ending says in which format.
        options: those of `convert`.

    Returns:
        A figure, which a notebook shows; ``figure.savefig`` writes it to a file.

    Raises:
        RevifyError: an argument is not as it must be, or matplotlib is missing.
    """
    written = checked_path(path)
    if isinstance(model, nn.Module) and settings_of(model):
        check_unused(options if example_inputs is None else {"example_inputs": example_inputs, **options})
        found = report(model)
    else:
        found = explain(model, example_inputs, **options)
    return finished(draw(found, model), written)


def draw(report: Report, model: nn.Module) -> Figure:
    boxes = boxes_of(report, [path for path, _ in model.named_modules()])
    labelled = len(boxes) <= _LABELLED
    rows = [(name, list(group)) for name, group in groupby(boxes, lambda box: box.row)]
    if not labelled:
        rows = [(f"{name} ({len(row)})", row) for name, row in rows]
    left = _MARGIN + min(1.5, max((_LETTER * len(name) for name, _ in rows), default=0) + 0.12)
    lines = [(name if i == 0 else "", line) for name, row in rows for i, line in enumerate(_lines(row, left, labelled))]
    title = textwrap.wrap(_title(report), 54)
    entries = _legend(report)
    heights = [_height(line, labelled) for _, line in lines]
    top = 0.14 + 0.17 * len(title) + 0.08
    height = top + sum(heights) + 0.08 + 0.2 * len(entries) + 0.06
    figure = picture(_WIDTH, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
    axes.axis("off")
    for i, words in enumerate(title):
        axes.text(_MARGIN, 0.2 + 0.17 * i, words, fontsize=9.5, fontweight="bold", va="center")
    y = top
    for (name, line), space in zip(lines, heights, strict=True):
        axes.text(
            _MARGIN, y + (space - 0.08) / 2, shortened(name, int((left - _MARGIN) / _LETTER)), fontsize=8.5, va="center"
        )
        _draw_line(axes, line, left, y, space - 0.08, labelled)
        y += space
    for i, marks in enumerate(entries):
        x = _MARGIN + 0.06
        for marker, colour, words in marks:
            axes.plot(x, y + 0.16 + 0.2 * i, marker, color=colour, markersize=6)
            axes.text(x + 0.1, y + 0.16 + 0.2 * i, words, fontsize=8.5, va="center")
            x += 1.6
    return figure


def _title(report: Report) -> str:
    units = sum(len(chain.units) for chain in report.chains)
    refused = f", {len(report.refusals)} refused" if report.refusals else ""
    if not units:
        return f"{report.model}: nothing to convert{refused}"
    return f"{report.model}: {_counted(units, 'unit')} in {_counted(len(report.chains), 'chain')}{refused}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _lines(row: Sequence[Box], left: float, labelled: bool) -> list[list[Box]]:
    """The row, cut where it is wider than the picture."""
    lines: list[list[Box]] = [[]]
    x = left
    for box in row:
        width = _box_width(box, labelled)
        if lines[-1] and x + width > _WIDTH - _MARGIN:
            lines.append([])
            x = left
        lines[-1].append(box)
        x += width
    return lines


def _words(box: Box) -> list[str]:
    return [shortened(box.label, 24), *(f"{code} x{n}" if n > 1 else code for code, n in Counter(box.codes).items())]


def _box_width(box: Box, labelled: bool) -> float:
    """With the gap to the next one."""
    marks = _MARKER * (len(box.units) + len(box.codes)) + 0.03
    if not labelled:
        return marks + 0.04
    return max(marks, 0.26, *(_LETTER * len(words) + 0.04 for words in _words(box))) + 0.1


def _height(line: Sequence[Box], labelled: bool) -> float:
    """With the gap to the next one."""
    if not labelled:
        return 0.16 + 0.08
    return 0.3 + 0.13 * max(len(_words(box)) for box in line) + 0.08


def _draw_line(axes: Axes, line: Sequence[Box], x: float, y: float, height: float, labelled: bool) -> None:
    for chain, group in groupby(line, lambda box: box.chain):
        boxes = list(group)
        width = sum(_box_width(box, labelled) for box in boxes)
        if chain is not None:
            band = Rectangle((x + 0.01, y), width - 0.02, height, facecolor=_tint(_colour(chain)), linewidth=0)
            axes.add_patch(band)
        for box in boxes:
            _draw_box(axes, box, x + _box_width(box, labelled) / 2, y, height, labelled)
            x += _box_width(box, labelled)


def _draw_box(axes: Axes, box: Box, middle: float, y: float, height: float, labelled: bool) -> None:
    if labelled:
        width, colour = _box_width(box, labelled) - 0.14, RED if box.codes else _colour(box.chain)
        frame = FancyBboxPatch((middle - width / 2, y + 0.07), width, height - 0.14, boxstyle="round,pad=0.02")
        frame.set(facecolor="#fbecee" if box.chain is None else "white", edgecolor=colour, linewidth=0.8)
        axes.add_patch(frame)
        for i, words in enumerate(_words(box)):
            at = y + 0.13 + 0.13 * i
            axes.text(middle, at, words, fontsize=8, ha="center", va="center", color=RED if i else "black")
    marks = [("D" if transition else "o", _colour(chain)) for chain, transition in box.units]
    marks += [("X", RED)] * len(box.codes)
    for i, (marker, colour) in enumerate(marks):
        x = middle + _MARKER * (i - (len(marks) - 1) / 2)
        axes.plot(x, y + height - (0.14 if labelled else height / 2), marker, color=colour, markersize=5)


def _colour(chain: int | None) -> str:
    return GREY if chain is None else _CHAINS[chain % len(_CHAINS)]


def _tint(colour: str) -> tuple[float, ...]:
    return tuple(0.7 + 0.3 * part for part in to_rgb(colour))


def _legend(report: Report) -> list[list[tuple[str, str, str]]]:
    """Lines of marks, colours and words."""
    lines = []
    chains = [
        ("s", _CHAINS[i % len(_CHAINS)], f"{chain.name}: {_counted(len(chain.units), 'unit')}")
        for i, chain in enumerate(report.chains)
    ]
    shown = chains if len(chains) <= 6 else [*chains[:5], ("s", "white", f"and {len(chains) - 5} more chains")]
    lines += [shown[i : i + 3] for i in range(0, len(shown), 3)]
    kinds = {unit.kind for chain in report.chains for unit in chain.units}
    meanings = {
        "identity": ("o", GREY, "the skip is the identity"),
        "transition": ("D", GREY, "transition: it changes the shape"),
    }
    if kinds:
        lines.append([meaning for kind, meaning in meanings.items() if kind in kinds])
    for code, count in Counter(refusal.code for refusal in report.refusals).items():
        lines.append([("X", RED, f"refused ({code}): {count}")])
    return lines
