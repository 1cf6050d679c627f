"""The two pictures: memory against depth, and time against memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from revify.plot._scatter import Point, label, scatter

_COLOURS = {
    "autograd": "#555555",
    "checkpoint": "#cc6633",
    "compile": "#aa3377",
    "peer": "#66aacc",
    "revify": "#228833",
    "budget": "#44aa66",
}
_STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))  # engines of a family share its colour
_MARKERS = "os^Dv"


def frontier(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Each engine a labelled point; those with a budget are joined by a line, from the least memory to the most."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    points = [replace(p, name=_short(p.name)) for p in points]
    scatter(axes, points, _COLOURS)
    axes.set(xscale="log", xlabel="peak memory of a step (MB)", ylabel="time of a step / plain autograd", title=title)
    _plain_numbers(axes.xaxis)
    label(figure, axes, points, _COLOURS)
    figure.savefig(path, dpi=150)


def _short(name: str) -> str:
    """Labels are many, and colours say the family."""
    return (
        name.replace("revify, budget", "budget").replace(" of the couplings", "").replace("checkpoint, ", "checkpoint ")
    )


def depth(curves: Mapping[str, Mapping[int, float]], families: Mapping[str, str], path: Path, *, title: str) -> None:
    """Megabytes against couplings, on logarithmic axes: ``{engine: {couplings: MB}}``."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    drawn: dict[str, int] = defaultdict(int)
    for name, points in curves.items():
        family = families.get(name, "peer")
        axes.plot(
            list(points),
            list(points.values()),
            color=_COLOURS[family],
            linestyle=_STYLES[drawn[family] % len(_STYLES)],
            marker=_MARKERS[drawn[family] % len(_MARKERS)],
            markersize=4,
            label=name,
        )
        drawn[family] += 1
    axes.set(xscale="log", yscale="log", xlabel="couplings (two updates each)", ylabel="MB", title=title)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.set_xticks(sorted({d for points in curves.values() for d in points}))
    axes.grid(alpha=0.25, which="major")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _plain_numbers(axis: Axis) -> None:
    """Ticks at 1, 2, 3, 5 times a power of ten, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_locator(NullLocator())
