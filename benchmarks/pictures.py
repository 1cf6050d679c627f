"""The two pictures: memory against depth, and time against memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

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


@dataclass(frozen=True)
class Point:
    """An engine in the picture of time against memory."""

    name: str
    family: str
    megabytes: float
    ratio: float  # time over plain's


def frontier(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Each engine a labelled point; those with a budget are joined by a line, from the least memory to the most."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    budgets = sorted((p for p in points if p.family == "budget"), key=lambda p: p.megabytes)
    (line,) = axes.plot([p.megabytes for p in budgets], [p.ratio for p in budgets], color=_COLOURS["budget"], zorder=1)
    for p in points:
        axes.plot(p.megabytes, p.ratio, color=_COLOURS[p.family], marker="o", markersize=6, linestyle="")
    axes.set(xscale="log", xlabel="peak memory of a step (MB)", ylabel="time of a step / plain autograd", title=title)
    axes.margins(x=0.12, y=0.1)
    _plain_numbers(axes.xaxis)
    axes.grid(alpha=0.25, which="major")
    _label(figure, axes, points, line)
    figure.savefig(path, dpi=150)


def _label(figure: Figure, axes: Axes, points: Sequence[Point], line: Line2D) -> None:
    """Names beside the points, each at the first place around its point where it covers nothing."""
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    dots = [axes.transData.transform((p.megabytes, p.ratio)) for p in points]
    corners = axes.transData.transform(line.get_xydata())
    dots += [a + (b - a) * i / 20 for a, b in pairwise(corners) for i in range(20)]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in dots]
    sides = (("left", 8), ("right", -8), ("center", 0))
    places = sorted(product((0, 12, -12, 24, -24, 36, -36, 48, -48), sides), key=lambda place: abs(place[0]))
    for p in points:
        for rise, (side, shift) in places:
            if not shift and not rise:
                continue
            label = axes.annotate(
                p.name.removeprefix("revify, ") if p.family == "budget" else p.name,
                (p.megabytes, p.ratio),
                (shift, rise),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8,
                color=_COLOURS[p.family],
                arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6} if rise else None,
            )
            label.set_in_layout(False)
            label.update_positions(renderer)
            box = Text.get_window_extent(label)  # without the line to the point
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and axes.bbox.containsy(box.y0)
            if (inside and not any(box.overlaps(other) for other in taken)) or (rise, (side, shift)) == places[-1]:
                taken.append(box)
                break
            label.remove()


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
