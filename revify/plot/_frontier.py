"""Time against memory: a labelled point for each way to train."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from revify._tools.frontier import ways
from revify.plot._figures import GREEN, ORANGE, checked_path, finished, picture, unit_for
from revify.plot._scatter import Point, label, scatter

_COLOURS = {"plain": "#333333", "converted": GREEN, "budget": "#44aa66", "checkpoint": ORANGE}


def frontier(
    model: nn.Module,
    inputs: Any,
    *,
    budgets: Sequence[float] = (0.25, 0.5, 0.75),
    rounds: int = 5,
    loss: Callable[[Any], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    path: str | Path | None = None,
    **options: Any,
) -> Figure:
    """Time against memory of a training step, measured on this machine: of the model as it is, converted, converted
    with memory budgets, and with checkpointing (`torch.utils.checkpoint`) of each module that holds converted units.

    Memory is the peak as `peak_bytes` counts it: what the step makes, gradients included; not parameters and inputs.
    Time is a step's over that of the plain step in the same round, in which the ways take turns; the median of the
    rounds. Everything runs in train mode on copies, one for each way; parameters, gradients, buffers and the random
    state of ``model`` are left as they were.

    Args:
        model: a residual network, not converted yet.
        inputs: of the model: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        budgets: the memory budgets to try, fractions from 0 to 1, as in `convert`.
        rounds: how many steps of each are timed, after two that are not.
        loss: maps the model's result to the scalar that the backward pass starts from; by default the sum of all
            floating-point tensors in the result.
        autocast: the dtype of `torch.autocast` in the forward pass; None is without.
        path: a file to save the picture in; the name's ending says in which format.
        options: others of `convert`.

    Returns:
        A figure, which a notebook shows; ``figure.savefig`` writes it to a file.

    Raises:
        NotConvertibleError: as `convert` does.
        RevifyError: an argument is not as it must be, or matplotlib is missing.
    """
    written = checked_path(path)
    found = ways(model, inputs, budgets=budgets, rounds=rounds, loss=loss, autocast=autocast, **options)
    plain, converted = found[:2]
    size, unit = unit_for(max(way.peak for way in found))
    points = [Point(way.name, way.family, way.peak / size, way.ratio) for way in found]
    figure = picture(5, 3.6)
    axes = figure.subplots()
    scatter(axes, points, _COLOURS)
    axes.set_xlim(left=0)
    axes.set(xlabel=f"peak memory of a step ({unit})", ylabel="time of a step (as it is: 1)")
    less, more = converted.peak / plain.peak, converted.ratio
    title = f"{type(model).__name__}, converted: {100 * less:.0f} % of the memory, {more:.2f} times the time"
    axes.set_title(textwrap.fill(title, 62), fontsize=10)
    label(figure, axes, points, _COLOURS, size=9)
    return finished(figure, written)
