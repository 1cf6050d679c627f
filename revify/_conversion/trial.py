"""A plan -> how it goes in a forward pass of training on the example inputs, run without values.

What blocks hand on to one another is seen there as it will be; and a unit that cannot run as one, since its branch
returns another shape, fails there and not in the user's first step.

Requires: a plan over ``root``. Leaves: an `Outcome`; root as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from revify._analysis.links import Chain, Segment, sibling_pairs
from revify._analysis.observe import hollow, mode_of, random_numbers_kept, without_hooks
from revify._analysis.plan import ChainPlan, Plan
from revify._analysis.report import Report
from revify._analysis.units import Unit
from revify._arguments import arguments
from revify._conversion.apply import apply
from revify._conversion.blocks import MODEL
from revify._errors import UnitError
from revify._refusals import Refusal


@dataclass(frozen=True)
class Outcome:
    """``runs`` are the names of the units that each chain went through, in order; None where the pass could not be run
    to its end. ``failed`` is the unit that could not run, and why. ``always``: whether other steps go the same way."""

    runs: tuple[tuple[str, ...], ...] | None
    failed: UnitError | None
    always: bool


def trial(plan: Plan, root: nn.Module, example_inputs: Any) -> Outcome:
    """Every block hands its streams on where the model's own code goes on with that; else those that are known to, and
    else none."""
    for handing_on in (frozenset(block.path for block in plan.blocks), plan.handing_on, frozenset()):
        outcome = _trial(replace(plan, handing_on=handing_on), root, example_inputs)
        if outcome.runs is not None or outcome.failed is not None:
            break
    return outcome


def _trial(plan: Plan, root: nn.Module, example_inputs: Any) -> Outcome:
    log: list[tuple[Any, str]] = []
    with random_numbers_kept() as drew:
        try:
            args, kwargs = arguments(example_inputs)
            model, args, kwargs = hollow(root, args, kwargs)
            model = apply(plan, model, Report("", (), (), ()), False, None, 1)
            settings = model.__dict__[MODEL].settings
            settings.log = log
            without_hooks(model)
            model.train()
            with mode_of(model), torch.enable_grad():
                model(*args, **kwargs)
        except UnitError as error:
            return Outcome(None, error, not drew())
        except Exception:  # values are needed somewhere: the first step will tell
            return Outcome(None, None, not drew())
        always = not drew()
    runs: dict[int, list[str]] = {}
    for run, name in log:
        runs.setdefault(id(run), []).append(name)
    return Outcome(tuple(map(tuple, runs.values())), None, always)


def as_observed(plan: Plan, outcome: Outcome) -> Plan:
    """The plan with the chains that were seen."""
    assert outcome.runs is not None
    if not outcome.always:  # in other steps other blocks are called, so any may go on from any
        paths = [block.path for block in plan.blocks]
        return replace(plan, handing_on=frozenset(paths), assumed=sibling_pairs(paths))
    names = {block.full_name(unit): (block, unit) for block in plan.blocks for unit in block.units}
    seen: set[str] = set()
    chains: list[Chain] = []
    handing_on: set[str] = set()
    for run in outcome.runs:
        units = [names[name] for name in run if name in names and name not in seen]
        seen.update(run)
        segments: list[tuple[Any, list[Unit]]] = []
        for block, unit in units:
            if segments and segments[-1][0] is block:
                segments[-1][1].append(unit)
            else:
                segments.append((block, [unit]))
        handing_on |= {block.path for block, _ in segments[:-1]}
        if segments:
            chains.append(Chain(tuple(Segment(block, tuple(us), None, None) for block, us in segments)))
    for chain in (c.chain for c in plan.chains):  # what the example does not call
        if not any(s.block.full_name(unit) in seen for s in chain.segments for unit in s.units):
            chains.append(chain)
            handing_on |= {s.block.path for s in chain.segments}
    planned = tuple(ChainPlan(f"chain {i + 1}", chain, None, None) for i, chain in enumerate(chains))
    return replace(plan, chains=planned, handing_on=frozenset(handing_on), assumed=())


def refusal(outcome: Outcome) -> Refusal:
    assert outcome.failed is not None
    return Refusal(outcome.failed.unit, outcome.failed.code, str(outcome.failed))
