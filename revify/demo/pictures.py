"""Pictures of training runs: curves, and memory against depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

_COLOURS = ("#4477aa", "#cc6633", "#228833", "#aa3377", "#66aacc", "#888888")


def curves(
    runs: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, *, title: str, step: str = "step"
) -> None:
    """Loss, and test accuracy by epoch, of each run: ``{name: (losses, accuracies)}``. There is a loss for each
    ``step``: one a "step", shown as a running mean, or one an "epoch"."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, (losses, accuracies)), colour in zip(runs.items(), _COLOURS, strict=False):
        shown = _smoothed(losses) if step == "step" else losses
        left.plot(range(1, len(losses) + 1), shown, color=colour, label=name)
        right.plot(range(1, len(accuracies) + 1), [100 * a for a in accuracies], color=colour, label=name, marker=".")
    left.set(xlabel=step, ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def memory_against_depth(kept: Mapping[str, Mapping[int, float]], path: Path, *, title: str) -> None:
    """Bytes against layers, of each network: ``{name: {layers: bytes}}``."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, points), colour in zip(kept.items(), _COLOURS, strict=False):
        axes.plot(list(points), [v / 1e6 for v in points.values()], color=colour, marker="o", markersize=4, label=name)
    axes.set(xlabel="layers", ylabel="MB", xticks=list(next(iter(kept.values()))))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title(title)
    figure.savefig(path, dpi=150)


def _smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Running means with exponential weights, without the bias of the start."""
    smoothed, mean, total = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed
