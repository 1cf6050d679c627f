"""What a step holds, operation by operation: two panels, one scale."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from revify._engine.chain import settings_of
from revify._tools.timeline import Timeline, timelines
from revify.plot._figures import BLUE, ORANGE, checked_path, finished, picture, shortened, unit_for


def memory_timeline(
    model: nn.Module,
    inputs: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    path: str | Path | None = None,
    **options: Any,
) -> Figure:
    """What one training step holds, operation by operation: the model as it is above, its conversion below.

    Counted as by `peak_bytes`, in bytes: what the step makes, activations and gradients, each from its making to its
    release; not parameters and inputs. Each peak is named, with the module and the operation that were at work. A
    model that is converted already is shown storing its activations, and reconstructing them.

    The step is that of `estimate`, in train mode and without values, so that a model that does not fit is no problem;
    one that reads values is run on a copy of model and inputs. Parameters, gradients, buffers and the random state are
    left as they were.

    Args:
        model: a residual network, or what `convert` made of one, or a module that holds a `ReversibleChain`.
        inputs: of the model: a tensor, a tuple of positional inputs or a dict of keyword inputs. Only shapes and
            dtypes matter, as a rule.
        loss: maps the model's result to the scalar that the backward pass starts from; by default the sum of all
            floating-point tensors in the result.
        autocast: the dtype of `torch.autocast` in the forward pass; None is without.
        path: a file to save the picture in; the name's ending says in which format.
        options: those of `convert`.

    Returns:
        A figure, which a notebook shows; ``figure.savefig`` writes it to a file.

    Raises:
        NotConvertibleError: as `convert` does.
        RevifyError: an argument is not as it must be, or matplotlib is missing.
    """
    written = checked_path(path)
    plain, reversible = timelines(model, inputs, loss=loss, autocast=autocast, **options)
    names = ("stored", "reversible") if settings_of(model) else ("as it is", "converted")
    return finished(draw(type(model).__name__, dict(zip(names, (plain, reversible), strict=True))), written)


def draw(model: str, steps: dict[str, Timeline]) -> Figure:
    figure = picture(5, 4.4)
    panels = figure.subplots(2, 1, sharey=True)
    peaks = [step.moments[step.peak].bytes for step in steps.values()]
    size, unit = unit_for(max(peaks))
    said = [f"{peak / size:,.1f} {unit}" for peak in peaks]
    for axes, (name, step), peak in zip(panels, steps.items(), said, strict=True):
        _panel(axes, f"{name}: {peak}", step, size)
    panels[0].set_ylim(0, 1.3 * max(peaks) / size)  # room for what is written above
    panels[1].set_xlabel("operations of the step, in order")
    figure.supylabel(f"memory ({unit})", fontsize=10)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    title = f"{model}: peak of a step {said[1]} instead of {said[0]}"
    figure.suptitle(textwrap.fill(title, 62), fontsize=10)
    return figure


def _panel(axes: Axes, title: str, step: Timeline, size: float) -> None:
    count, places = len(step.moments), range(len(step.moments) + 1)
    gradients = [moment.gradients / size for moment in step.moments]
    held = [moment.bytes / size for moment in step.moments]
    axes.axvspan(step.forward, count, color="#eeeeee", linewidth=0)
    bottom, top = [*gradients, gradients[-1]], [*held, held[-1]]
    axes.fill_between(
        places, bottom, top, step="post", color=BLUE, linewidth=0, label="activations, and what is worked on"
    )
    axes.fill_between(places, 0, bottom, step="post", color=ORANGE, linewidth=0, label="gradients")
    for text, start, end in (("forward", 0, step.forward), ("backward", step.forward, count)):
        axes.annotate(
            text, ((start + end) / 2, 1), (0, -3), axes.get_xaxis_transform(), "offset points",
            ha="center", va="top", fontsize=9, color="#666666",
        )  # fmt: skip
    axes.set_xlim(0, count)
    peak = step.moments[step.peak]
    operation = peak.operation if len(peak.operation) <= 20 else f"{peak.operation[:19]}…"
    where = f"{shortened(peak.module, 31 - len(operation))}, {operation}" if peak.module else operation
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_title(where, loc="right", fontsize=8)
    axes.plot(step.peak + 0.5, peak.bytes / size, "o", color="black", markersize=4, clip_on=False)
