"""A converted model and example inputs -> what a training step keeps, from forward passes without values.

Each tensor that autograd saves goes to whoever runs when it is first saved: a chain, the stem, or a module outside of
them. The engine measures the chains besides, as it does for a memory budget.

Requires: a converted model. Leaves: its report with what is known of a step; the model as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from revify._analysis.observe import hollow, mode_of, random_numbers_kept, without_hooks
from revify._analysis.report import Kept, Report
from revify._arguments import arguments
from revify._conversion.blocks import MODEL
from revify._engine import recompute, state
from revify._engine.budget import Budget
from revify._engine.run import Settings
from revify._measure import kept_by, tensors_in

Who = tuple[str, str]  # a kind, and a name: see `Kept`


def with_memory(report: Report, make: Callable[[], nn.Module], example_inputs: Any) -> Report:
    """``make`` gives the converted model. Where it needs values, nothing is known, and the report is as it was."""
    with random_numbers_kept():
        try:
            args, kwargs = arguments(example_inputs)
            model, args, kwargs = hollow(make(), args, kwargs)
            settings: Settings = model.__dict__[MODEL].settings
            given = [*model.parameters(), *model.buffers(), *tensors_in((args, kwargs))]
            without_hooks(model)
            model.train()
            who = _running(model)

            def kept() -> dict[Who, int]:
                return kept_by(lambda: model(*args, **kwargs), who, given)

            with mode_of(model), torch.enable_grad():
                if settings.budget is None:
                    settings.budget = Budget(0.0)
                else:
                    kept()  # a budget is spent once a step has been measured
                reversible = kept()
                settings.stores_activations = True
                stored = kept()
        except Exception:  # values are needed somewhere
            return report
    rows = [Kept(*who, stored.get(who, 0), reversible.get(who, 0)) for who in stored | reversible]
    rows.sort(key=lambda row: (row.kind, -row.reversible if row.kind == "module" else 0))
    return replace(with_choices(report, settings), kept=tuple(rows))


def with_choices(report: Report, settings: Settings) -> Report:
    """With what the chains keep, as far as a step has told."""
    choices = {name: planner.last for name, planner in settings.planners.items()}
    return replace(report, chains=tuple(replace(c, choice=choices.get(c.name)) for c in report.chains))


def _running(model: nn.Module) -> Callable[[Tensor], Who]:
    """Gives the function that says who runs."""
    running = [""]  # the model itself, also where it merges what its forward has returned

    def leave() -> None:
        running.pop()

    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(lambda *_, path=path: running.append(path))
            module.register_forward_hook(lambda *_: leave())
    return lambda _: _of_the_engine() or ("module", running[-1])


def _of_the_engine() -> Who | None:
    """The chain, or the stem, for which the engine is at work, as the calls in progress tell."""
    found: Who | None = None
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == recompute.__file__:
            found = "stem", ""  # but in a chain
        owner = frame.f_locals.get("self") if frame.f_code.co_filename == state.__file__ else None
        if isinstance(owner, state.State):
            return "chain", owner.run.name
        frame = frame.f_back
    return found
