"""Ways to train a model, each with the peak and the time of its step: plain, converted, with budgets, checkpointed."""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import truediv
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from revify._analysis.observe import check_fit
from revify._analysis.report import Report
from revify._arguments import arguments, fresh
from revify._conversion.convert import check_plain, convert, report
from revify._errors import RevifyError
from revify._fake import device_of
from revify._measure import peak_bytes, times_in_turn
from revify._tools.step import Loss, check_step, objective_of, random_state_kept


@dataclass(frozen=True)
class Way:
    """Attributes:
    name: what is done.
    family: "plain", "converted", "budget" or "checkpoint".
    peak: bytes that a step makes and holds at a time, as `peak_bytes` counts.
    ratio: the time of a step over that of the plain step in the same round; the median of the rounds.
    """

    name: str
    family: str
    peak: int
    ratio: float


def ways(
    model: nn.Module,
    inputs: Any,
    *,
    budgets: Sequence[float],
    rounds: int,
    loss: Loss | None,
    autocast: torch.dtype | None,
    **options: Any,
) -> list[Way]:
    """The plain step first, then the converted one; on copies, which all exist at a time."""
    check_step(model, loss, autocast)
    check_plain(model)
    _check_budgets(budgets)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise RevifyError(f"rounds must be a whole number of at least 1, got {rounds!r}.")
    if "memory_budget" in options:
        raise RevifyError("memory_budget is what is tried: leave it out, and give budgets.")
    args, kwargs = arguments(inputs, "inputs")
    check_fit(model, args, kwargs, "inputs")
    device = device_of(model)
    with random_state_kept(), torch.enable_grad():
        models = list(_models(model, kwargs or args, budgets, options))
        steps = [_step(copied, (args, kwargs), device, loss, autocast) for *_, copied in models]
        for step in steps:
            for _ in range(2):  # a budget is spent from the second step on; libraries allocate at their first use
                step()
        peaks = [_peak(step, copied, device) for step, (*_, copied) in zip(steps, models, strict=True)]
        times = times_in_turn(steps, rounds, device)
    ratios = [statistics.median(map(truediv, measured, times[0])) for measured in times]
    found = zip(models, peaks, ratios, strict=True)
    return [Way(name, family, peak, ratio) for (name, family, _), peak, ratio in found]


def _models(
    model: nn.Module, example_inputs: Any, budgets: Sequence[float], options: dict[str, Any]
) -> Iterator[tuple[str, str, nn.Module]]:
    yield "as it is", "plain", copy.deepcopy(model)
    converted = convert(model, example_inputs, **options)
    yield "converted", "converted", converted
    for budget in sorted(budgets):
        yield f"budget {budget:g}", "budget", convert(model, example_inputs, memory_budget=budget, **options)
    blocks = blocks_of(report(converted))
    if blocks:
        yield "each block checkpointed", "checkpoint", checkpointed(copy.deepcopy(model), blocks)


def blocks_of(report: Report) -> list[str]:
    """The paths of the modules that hold units, of those in one another the outermost; none where that is the model
    itself."""
    paths = {unit.module for chain in report.chains for unit in chain.units}
    if "" in paths:
        return []
    return sorted(p for p in paths if not any(p.startswith(f"{other}.") for other in paths))


def checkpointed(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """The model, whose modules at these paths keep their inputs alone and are evaluated again in the backward pass."""
    for path in paths:
        module = model.get_submodule(path)
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return model


def _step(
    model: nn.Module, inputs: Any, device: torch.device, loss: Loss | None, autocast: torch.dtype | None
) -> Callable[[], None]:
    model.train()
    args, kwargs = fresh(inputs)
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]

    def step() -> None:
        for x in (*model.parameters(), *given):
            x.grad = None
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            objective = objective_of(model(*args, **kwargs), loss)
        objective.backward()

    return step


def _peak(step: Callable[[], None], model: nn.Module, device: torch.device) -> int:
    model.zero_grad()  # what is there before does not count
    return peak_bytes(step, device)


def _check_budgets(budgets: Any) -> None:
    numbers = isinstance(budgets, (list, tuple)) and all(
        isinstance(b, (int, float)) and not isinstance(b, bool) and 0 <= b <= 1 for b in budgets
    )
    if not numbers:
        raise RevifyError(f"budgets must be a tuple of fractions from 0 to 1, got {budgets!r}.")
