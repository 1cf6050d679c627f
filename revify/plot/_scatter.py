"""Labelled points of time against memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox


@dataclass(frozen=True)
class Point:
    """A way to train in the picture of time against memory, in any unit; those of the family "budget" are joined."""

    name: str
    family: str
    memory: float
    ratio: float  # time over plain's


def scatter(axes: Axes, points: Sequence[Point], colours: Mapping[str, str]) -> None:
    budgets = _budgets(points)
    axes.plot([p.memory for p in budgets], [p.ratio for p in budgets], color=colours["budget"], zorder=1)
    for p in points:
        axes.plot(p.memory, p.ratio, color=colours[p.family], marker="o", markersize=6, linestyle="")
    axes.margins(x=0.12, y=0.1)
    axes.grid(alpha=0.25, which="major")


def _budgets(points: Sequence[Point]) -> list[Point]:
    return sorted((p for p in points if p.family == "budget"), key=lambda p: p.memory)


def label(figure: Figure, axes: Axes, points: Sequence[Point], colours: Mapping[str, str], size: float = 8) -> None:
    """Names beside the points, each at the first place around its point where it covers nothing."""
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    dots = [axes.transData.transform((p.memory, p.ratio)) for p in points]
    corners = [axes.transData.transform((p.memory, p.ratio)) for p in _budgets(points)]
    dots += [a + (b - a) * i / 20 for a, b in pairwise(corners) for i in range(20)]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in dots]
    sides = (("left", 8), ("right", -8), ("center", 0))
    places = sorted(product((0, 12, -12, 24, -24, 36, -36, 48, -48), sides), key=lambda place: abs(place[0]))
    for p in points:
        for rise, (side, shift) in places:
            if not shift and not rise:
                continue
            label = axes.annotate(
                p.name,
                (p.memory, p.ratio),
                (shift, rise),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=size,
                color=colours[p.family],
                arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6} if rise else None,
            )
            label.set_in_layout(False)
            label.update_positions(renderer)
            box = Text.get_window_extent(label)  # without the line to the point
            inside = all(axes.bbox.padded(-3).contains(*corner) for corner in (box.p0, box.p1))
            if (inside and not any(box.overlaps(other) for other in taken)) or (rise, (side, shift)) == places[-1]:
                taken.append(box)
                break
            label.remove()
