"""convert, explain, report: each stage in turn."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from revify._analysis.chains import find_chains
from revify._analysis.operations import Operations
from revify._analysis.plan import ChainPlan, Plan, make_plan
from revify._analysis.report import ChainReport, Refusal, Report, UnitReport
from revify._analysis.trace import module_path, trace
from revify._conversion.rewrite import Converted, rewrite
from revify._engine.budget import check_memory_budget
from revify._engine.chain import ReversibleChain, check_coupling, check_exact
from revify._errors import NotConvertibleError, RevifyError


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    coupling: str = "revnet",
    entry: str = "duplicate",
    exit: str = "mean",
    tie_shortcuts: bool = True,
    exact: bool = False,
    memory_budget: float | None = None,
    strict: bool = False,
) -> nn.Module:
    """Returns the reversible form of a residual network; ``model`` is left as it was.

    The new model has copies of the same parameters under the same names, and computes a *different function* of
    them: each chain of residual additions runs in two streams (Gomez et al. 2017). Its training step keeps
    activations that do not grow with the number of units.

    Args:
        model: a residual network.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; needed only where
            forward has optional arguments, to say which of them are given.
        coupling: the recurrence; ``"revnet"`` is the one there is.
        entry: how the two streams begin: ``"duplicate"`` (both are the chain's input) or ``"widen"`` (the layer that
            makes the input gets twice the output channels, and its output is split in halves by channel).
        exit: how they end: ``"mean"`` ((x1 + x2) / 2) or ``"concat"`` (by channel; the layers that read the result
            are widened). New weights are drawn from the global random generator.
        tie_shortcuts: whether both streams share the projections of a transition; otherwise the second stream has
            a copy of its own, under ``stream2``.
        exact: whether the state runs on a grid, so that the backward pass reconstructs it bit for bit and checks
            that it did; see `ReversibleChain`.
        memory_budget: what the chains may keep of their activations, as a fraction (0 to 1) of what plain autograd
            keeps or in bytes, together; None keeps the least. It is spent where it saves most time; `report` says how,
            after the first training step.
        strict: refuse the whole model where any unit is refused.

    Raises:
        NotConvertibleError: no unit can be converted, or, with ``strict``, not every one; lists each reason.
        RevifyError: an argument is not as it must be.
    """
    _check_options(coupling, entry, exit, tie_shortcuts, exact, memory_budget, strict)
    analysis = _analyse(model, example_inputs, entry=entry, exit=exit, tie_shortcuts=tie_shortcuts)
    report = analysis.report
    if not report.chains:
        raise NotConvertibleError(_listing(f"{report.model} has nothing that can be converted", report.refusals))
    if strict and report.refusals:
        raise NotConvertibleError(_listing(f"{report.model} cannot be converted completely", report.refusals))
    return rewrite(analysis.graph, analysis.root, analysis.plan, report, exact, memory_budget)


def explain(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    coupling: str = "revnet",
    entry: str = "duplicate",
    exit: str = "mean",
    tie_shortcuts: bool = True,
    exact: bool = False,
    memory_budget: float | None = None,
    strict: bool = False,
) -> Report:
    """What `convert` with the same arguments would do, as a `Report`; converts nothing. A model that cannot be
    converted is no error here: its report has no chains.

    Raises:
        RevifyError: an argument is not as it must be.
    """
    _check_options(coupling, entry, exit, tie_shortcuts, exact, memory_budget, strict)
    try:
        return _analyse(model, example_inputs, entry=entry, exit=exit, tie_shortcuts=tie_shortcuts).report
    except NotConvertibleError as error:
        name = type(model).__name__
        return Report(name, (), (Refusal(name, error.code, str(error)),), ())


def report(model: nn.Module) -> Report:
    """The `Report` of a converted model.

    Raises:
        RevifyError: the model was not made by `convert`.
    """
    if not isinstance(model, Converted):
        raise RevifyError(
            f"model must be a model that convert returned, got {type(model).__name__}. "
            "For a model that is not converted, use explain."
        )
    made = model.revify_report
    planners = {m.name: m.planner for m in model.modules() if isinstance(m, ReversibleChain)}
    choices = {name: planner.last for name, planner in planners.items() if planner is not None}
    return replace(made, chains=tuple(replace(c, choice=choices.get(c.name)) for c in made.chains))


@dataclass(frozen=True)
class _Analysis:
    root: nn.Module  # a copy of the user's model
    graph: fx.Graph
    plan: Plan
    report: Report


def _analyse(model: nn.Module, example_inputs: Any, *, entry: str, exit: str, tie_shortcuts: bool) -> _Analysis:
    if not isinstance(model, nn.Module):
        raise RevifyError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if any(isinstance(m, ReversibleChain) for m in model.modules()):
        raise RevifyError(
            f"model holds a ReversibleChain already ({type(model).__name__}): pass the model it was made from."
        )
    root = copy.deepcopy(model)
    traced = trace(root, example_inputs)
    found = find_chains(traced.graph, root)
    plan = make_plan(traced.graph, root, found.chains, entry=entry, exit=exit, tie_shortcuts=tie_shortcuts)
    converted = set().union(*(chain.chain.nodes() for chain in plan.chains))
    inside = {str(node.target) for node in converted if node.op == "call_module"}  # what a branch holds may stay whole
    refusals = (*(r for r in traced.refusals if r.where not in inside), *found.refusals, *plan.refusals)
    if not found.chains and not refusals:
        refusals = (_no_additions(traced.graph, root, type(model).__name__),)
    chains = tuple(_chain_report(chain) for chain in plan.chains)
    notes = tuple(_notes(plan, Operations(traced.graph, root)))
    return _Analysis(root, traced.graph, plan, Report(type(model).__name__, chains, refusals, notes))


def _chain_report(plan: ChainPlan) -> ChainReport:
    units = (link.unit for link in plan.chain.links)
    return ChainReport(
        plan.name,
        tuple(UnitReport(unit.total.name, unit.kind, module_path(unit.total)) for unit in units),
        "duplicate" if plan.entry is None else "widen",
        "mean" if plan.exit is None else "concat",
    )


def _notes(plan: Plan, ops: Operations) -> list[str]:
    notes = []
    if plan.chains:
        notes.append(
            "The converted model is another function of the same parameters: trained weights are a start to "
            "fine-tune from."
        )
    links = [link for chain in plan.chains for link in chain.chain.links]
    if any(ops.is_activation(node) for link in links for node in link.heads):
        notes.append(
            "The activation after each addition is moved: the streams carry the sum before it, and it is applied "
            "at the head of every branch and projection, and once at the chain's exit."
        )
    if any(ops.is_norm(node) for link in links for node in link.heads):
        notes.append("A norm that a branch and its projection share is called for each.")
    if plan.stem is not None:
        notes.append("What lies ahead of the first chain keeps its input alone, and is evaluated again in backward.")
    return notes


def _no_additions(graph: fx.Graph, root: nn.Module, name: str) -> Refusal:
    ops = Operations(graph, root)
    joins = sum(ops.name(node) in ("cat", "concat", "concatenate") for node in graph.nodes)
    found = f"its blocks join by {joins} concatenations" if joins else "its layers follow one another"
    return Refusal(
        name,
        "no-additions",
        f"there is no residual addition z + f(z): {found}, and nothing of that can be inverted. "
        "Use a residual network, or activation checkpointing for this one.",
    )


def _listing(head: str, refusals: tuple[Refusal, ...]) -> str:
    return "\n".join([head + ":", *(f"  - {refusal}" for refusal in refusals)])


def _check_options(
    coupling: str,
    entry: str,
    exit: str,
    tie_shortcuts: bool,
    exact: bool,
    memory_budget: float | None,
    strict: bool,
) -> None:
    check_coupling(coupling)
    check_exact(exact)
    check_memory_budget(memory_budget)
    if entry not in ("duplicate", "widen"):
        raise RevifyError(f"entry must be 'duplicate' or 'widen', got {entry!r}.")
    if exit not in ("mean", "concat"):
        raise RevifyError(f"exit must be 'mean' or 'concat', got {exit!r}.")
    for name, value in (("tie_shortcuts", tie_shortcuts), ("strict", strict)):
        if not isinstance(value, bool):
            raise RevifyError(f"{name} must be True or False, got {value!r}.")
